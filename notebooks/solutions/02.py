"""
Solutions of lesson 02, and usual mistakes, which the lesson must notice. The tests put each into
the lesson. They need the names that the lesson has defined up to there.
"""

# Exercise 1, mistake: uniform in sigma
def loguniform(u, low=0.02, high=80.0):
    return low + (high - low) * u

# Exercise 1, mistake: the logarithm
def loguniform(u, low=0.02, high=80.0):
    return math.log(low) + (math.log(high) - math.log(low)) * u

# Exercise 1, mistake: backwards
def loguniform(u, low=0.02, high=80.0):
    return high * (low / high) ** u

# Exercise 1, mistake: u is ignored
def loguniform(u, low=0.02, high=80.0):
    return torch.logspace(math.log10(low), math.log10(high), len(u))

# Exercise 1, mistake: not of the shape of u
def loguniform(u, low=0.02, high=80.0):
    return low * (high / low) ** u.flatten()

# Exercise 1, solution
def loguniform(u, low=0.02, high=80.0):
    return low * (high / low) ** u

# Exercise 2, mistake: the sign
def v_scalings(sigma):
    alpha = 1 / (1 + sigma ** 2).sqrt()
    return alpha ** 2, sigma * alpha

# Exercise 2, mistake: not squared
def v_scalings(sigma):
    alpha = 1 / (1 + sigma ** 2).sqrt()
    return alpha, -sigma * alpha

# Exercise 2, solution
def v_scalings(sigma):
    alpha = 1 / (1 + sigma ** 2).sqrt()
    c_skip = alpha ** 2
    c_out = -sigma * alpha
    return c_skip, c_out

# Exercise 3, mistake: not divided
def error_of_noise(x, guessed, noise, sigma):
    estimate = x - guessed
    return ((estimate - noise) ** 2).mean(dim=(1, 2, 3))

# Exercise 3, mistake: the sign
def error_of_noise(x, guessed, noise, sigma):
    s = sigma[:, None, None, None]
    estimate = (guessed - x) / s
    return ((estimate - noise) ** 2).mean(dim=(1, 2, 3))

# Exercise 3, solution
def error_of_noise(x, guessed, noise, sigma):
    s = sigma[:, None, None, None]
    estimate = (x - guessed) / s
    return ((estimate - noise) ** 2).mean(dim=(1, 2, 3))
