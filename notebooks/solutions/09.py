"""
Solutions of lesson 09, and usual mistakes, which the lesson must notice. The tests put each into
the lesson. They need the names that the lesson has defined up to there.
"""

# Exercise 1, mistake: the wrong way round
@torch.no_grad()
def merge(lora):
    new = copy.deepcopy(lora.layer)
    new.weight += (lora.B @ lora.A).T
    return new

# Exercise 1, mistake: not copied
@torch.no_grad()
def merge(lora):
    new = lora.layer
    new.weight += lora.B @ lora.A
    return new

# Exercise 1, mistake: the old layer
@torch.no_grad()
def merge(lora):
    return copy.deepcopy(lora.layer)

# Exercise 1, solution
@torch.no_grad()
def merge(lora):
    new = copy.deepcopy(lora.layer)
    new.weight += lora.B @ lora.A
    return new

# Exercise 2, mistake: as many is not fewer
def largest_rank(d_in, d_out):
    return d_in * d_out // (d_in + d_out)

# Exercise 2, mistake: A alone
def largest_rank(d_in, d_out):
    return d_out

# Exercise 2, mistake: a fraction
def largest_rank(d_in, d_out):
    return d_in * d_out / (d_in + d_out)

# Exercise 2, solution
def largest_rank(d_in, d_out):
    return (d_in * d_out - 1) // (d_in + d_out)

# Exercise 3, mistake: down instead of up
@torch.no_grad()
def undo(denoise, x, s, t, iterations):
    y = x
    for _ in range(iterations):
        guess = denoise(y, torch.full((len(x),), s))
        y = x + (t - s) * (y - guess) / s
    return y

# Exercise 3, mistake: each round adds to the last
@torch.no_grad()
def undo(denoise, x, s, t, iterations):
    y = x
    for _ in range(iterations):
        guess = denoise(y, torch.full((len(x),), s))
        y = y + (s - t) * (y - guess) / s
    return y

# Exercise 3, mistake: the noise of x in every round
@torch.no_grad()
def undo(denoise, x, s, t, iterations):
    for _ in range(iterations):
        guess = denoise(x, torch.full((len(x),), s))
        y = x + (s - t) * (x - guess) / s
    return y

# Exercise 3, solution
@torch.no_grad()
def undo(denoise, x, s, t, iterations):
    y = x
    for _ in range(iterations):
        guess = denoise(y, torch.full((len(x),), s))
        y = x + (s - t) * (y - guess) / s
    return y
