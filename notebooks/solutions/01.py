"""
Solutions of lesson 01, and usual mistakes, which the lesson must notice. The tests put each into
the lesson. They need the names that the lesson has defined up to there.
"""

# Exercise 1, mistake: the likelier side
def coin_guess(x, sigma):
    return x.sign()

# Exercise 1, mistake: sigma, not its square
def coin_guess(x, sigma):
    return torch.tanh(x / sigma)

# Exercise 1, mistake: one level for all
def coin_guess(x, sigma):
    return torch.tanh(x / sigma[0] ** 2)

# Exercise 1, solution
def coin_guess(x, sigma):
    return torch.tanh(x / sigma ** 2)

# Exercise 2, mistake: fresh noise
@torch.no_grad()
def to_noise(denoise, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        guess = denoise(x, s.expand(len(x)))
        x = guess + t * torch.randn_like(x)
    return x

# Exercise 2, mistake: not divided by s
@torch.no_grad()
def to_noise(denoise, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        guess = denoise(x, s.expand(len(x)))
        x = guess + t * (x - guess)
    return x

# Exercise 2, mistake: the guess alone
@torch.no_grad()
def to_noise(denoise, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        x = denoise(x, s.expand(len(x)))
    return x

# Exercise 2, solution
@torch.no_grad()
def to_noise(denoise, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        guess = denoise(x, s.expand(len(x)))
        x = guess + t * (x - guess) / s
    return x

# Exercise 3, mistake: a factor is missing
def guess_of_list(x, sigma, points):
    return (-torch.cdist(x, points) ** 2 / sigma[:, None] ** 2).softmax(1) @ points

# Exercise 3, mistake: the wrong axis
def guess_of_list(x, sigma, points):
    return (-torch.cdist(x, points) ** 2 / (2 * sigma[:, None] ** 2)).softmax(0) @ points

# Exercise 3, mistake: not squared
def guess_of_list(x, sigma, points):
    return (-torch.cdist(x, points) / sigma[:, None]).softmax(1) @ points

# Exercise 3, mistake: one level for all
def guess_of_list(x, sigma, points):
    return (-torch.cdist(x, points) ** 2 / (2 * sigma[0] ** 2)).softmax(1) @ points

# Exercise 3, solution
def guess_of_list(x, sigma, points):
    weights = (-torch.cdist(x, points) ** 2 / (2 * sigma[:, None] ** 2)).softmax(dim=1)
    return weights @ points
