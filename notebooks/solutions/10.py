"""
Solutions of lesson 10, and usual mistakes, which the lesson must notice. The tests put each into
the lesson. They need the names that the lesson has defined up to there.
"""

# Exercise 1, mistake: n strides
def starts(length, n, stride):
    return max(0, length - n * stride)

# Exercise 1, mistake: one too few
def starts(length, n, stride):
    return max(0, length - ((n - 1) * stride + 1))

# Exercise 1, mistake: less than nothing
def starts(length, n, stride):
    return length - (n - 1) * stride

# Exercise 1, solution
def starts(length, n, stride):
    return max(0, length - (n - 1) * stride)

# Exercise 2, mistake: the sum of squares
def nearest(made, known):
    far = ((made[:, None] - known) ** 2).sum(dim=(2, 3, 4, 5))
    return far.argmin(dim=1), far.min(dim=1).values

# Exercise 2, mistake: the farthest
def nearest(made, known):
    far = ((made[:, None] - known) ** 2).mean(dim=(2, 3, 4, 5))
    return far.argmax(dim=1), far.max(dim=1).values

# Exercise 2, mistake: for each known clip
def nearest(made, known):
    far = ((made[:, None] - known) ** 2).mean(dim=(2, 3, 4, 5))
    return far.argmin(dim=0), far.min(dim=0).values

# Exercise 2, mistake: not squared
def nearest(made, known):
    far = (made[:, None] - known).abs().mean(dim=(2, 3, 4, 5))
    return far.argmin(dim=1), far.min(dim=1).values

# Exercise 2, mistake: one number for all
def nearest(made, known):
    far = ((made[:, None] - known) ** 2).mean(dim=(2, 3, 4, 5))
    return torch.full((len(made),), 3), far.min(dim=1).values

# Exercise 2, solution
def nearest(made, known):
    far = ((made[:, None] - known) ** 2).mean(dim=(2, 3, 4, 5))                             # (n, m)
    least, which = far.min(dim=1)
    return which, least

# Exercise 3, mistake: without the state
def largest_batch(room, state, clip):
    return int(room // clip)

# Exercise 3, mistake: less than nothing
def largest_batch(room, state, clip):
    return int((room - state) // clip)

# Exercise 3, mistake: halves
def largest_batch(room, state, clip):
    return max(0, (room - state) / clip)

# Exercise 3, solution
def largest_batch(room, state, clip):
    return max(0, int((room - state) // clip))
