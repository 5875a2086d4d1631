"""
Solutions of lesson 03, and usual mistakes, which the lesson must notice. The tests put each into
the lesson. They need the names that the lesson has defined up to there.
"""

# Exercise 1, mistake: its own frame only
ROWS = "(b t h) w c"

# Exercise 1, mistake: columns
ROWS = "(b w) (t h) c"

# Exercise 1, mistake: clips hear each other
ROWS = "h (b t w) c"

# Exercise 1, mistake: everything
ROWS = "b (t h w) c"

# Exercise 1, mistake: both sides of the arrow
ROWS = "b t c h w -> (b h) (t w) c"

# Exercise 1, mistake: four axes
ROWS = "b h (t w) c"

# Exercise 1, solution
ROWS = "(b h) (t w) c"

# Exercise 2, mistake: before and after exchanged
def conv_over_time(x, weight, bias):
    padded = F.pad(x, (0, 0, 1, 1))
    after, itself, before = weight.unbind(2)
    return padded[:, :-2] @ before.T + x @ itself.T + padded[:, 2:] @ after.T + bias

# Exercise 2, mistake: round in a circle
def conv_over_time(x, weight, bias):
    before, itself, after = weight.unbind(2)
    return x.roll(1, dims=1) @ before.T + x @ itself.T + x.roll(-1, dims=1) @ after.T + bias

# Exercise 2, mistake: the ends are repeated
def conv_over_time(x, weight, bias):
    padded = torch.cat([x[:, :1], x, x[:, -1:]], dim=1)
    before, itself, after = weight.unbind(2)
    return padded[:, :-2] @ before.T + x @ itself.T + padded[:, 2:] @ after.T + bias

# Exercise 2, mistake: one frame late
def conv_over_time(x, weight, bias):
    padded = F.pad(x, (0, 0, 2, 0))
    before, itself, after = weight.unbind(2)
    return padded[:, :-2] @ before.T + padded[:, 1:-1] @ itself.T + x @ after.T + bias

# Exercise 2, mistake: no bias
def conv_over_time(x, weight, bias):
    padded = F.pad(x, (0, 0, 1, 1))
    before, itself, after = weight.unbind(2)
    return padded[:, :-2] @ before.T + x @ itself.T + padded[:, 2:] @ after.T

# Exercise 2, solution
def conv_over_time(x, weight, bias):
    padded = F.pad(x, (0, 0, 1, 1))                         # a frame of zeros before and behind
    before, itself, after = weight.unbind(2)
    return padded[:, :-2] @ before.T + x @ itself.T + padded[:, 2:] @ after.T + bias

# Exercise 3, mistake: upside down
def causal_mask(T):
    return torch.ones(T, T, dtype=torch.bool).triu()

# Exercise 3, mistake: without itself
def causal_mask(T):
    return torch.ones(T, T, dtype=torch.bool).tril(-1)

# Exercise 3, mistake: numbers
def causal_mask(T):
    return torch.ones(T, T).tril()

# Exercise 3, solution
def causal_mask(T):
    return torch.ones(T, T, dtype=torch.bool).tril()
