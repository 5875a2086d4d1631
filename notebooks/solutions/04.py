"""
Solutions of lesson 04, and usual mistakes, which the lesson must notice. The tests put each into
the lesson. They need the names that the lesson has defined up to there.
"""

# Exercise 1, mistake: two Euler steps
@torch.no_grad()
def midpoint(denoise, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        middle = (s + t) / 2
        x = x + (middle - s) * (x - denoise(x, s.expand(len(x)))) / s
        x = x + (t - middle) * (x - denoise(x, middle.expand(len(x)))) / middle
    return x

# Exercise 1, mistake: x is not moved
@torch.no_grad()
def midpoint(denoise, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        middle = (s + t) / 2
        ahead = x + (middle - s) * (x - denoise(x, s.expand(len(x)))) / s
        x = x + (t - s) * (x - denoise(x, middle.expand(len(x)))) / middle
    return x

# Exercise 1, mistake: asked once
@torch.no_grad()
def midpoint(denoise, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        middle = (s + t) / 2
        x = x + (t - s) * (x - denoise(x, middle.expand(len(x)))) / middle
    return x

# Exercise 1, mistake: the whole step from the middle
@torch.no_grad()
def midpoint(denoise, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        middle = (s + t) / 2
        ahead = x + (middle - s) * (x - denoise(x, s.expand(len(x)))) / s
        x = ahead + (t - s) * (ahead - denoise(ahead, middle.expand(len(x)))) / middle
    return x

# Exercise 1, solution
@torch.no_grad()
def midpoint(denoise, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        middle = (s + t) / 2
        ahead = x + (middle - s) * (x - denoise(x, s.expand(len(x)))) / s
        x = x + (t - s) * (ahead - denoise(ahead, middle.expand(len(x)))) / middle
    return x

# Exercise 2, mistake: sizes are subtracted
def churn(x, s, amount, unit):
    up = s * (1 + amount)
    return x + (up - s) * unit, up

# Exercise 2, mistake: the whole level is added
def churn(x, s, amount, unit):
    up = s * (1 + amount)
    return x + up * unit, up

# Exercise 2, mistake: no root
def churn(x, s, amount, unit):
    up = s * (1 + amount)
    return x + (up ** 2 - s ** 2) * unit, up

# Exercise 2, solution
def churn(x, s, amount, unit):
    up = s * (1 + amount)
    higher = x + (up ** 2 - s ** 2) ** 0.5 * unit
    return higher, up

# Exercise 3, mistake: one deviation for the batch
def rescaled(told, guided, share=0.7):
    return share * guided * told.std() / guided.std() + (1 - share) * guided

# Exercise 3, mistake: one for each frame
def rescaled(told, guided, share=0.7):
    axes = (2, 3, 4)
    corrected = guided * told.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return share * corrected + (1 - share) * guided

# Exercise 3, mistake: the full correction
def rescaled(told, guided, share=0.7):
    axes = (1, 2, 3, 4)
    return guided * told.std(axes, keepdim=True) / guided.std(axes, keepdim=True)

# Exercise 3, mistake: shares swapped
def rescaled(told, guided, share=0.7):
    axes = (1, 2, 3, 4)
    corrected = guided * told.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return (1 - share) * corrected + share * guided

# Exercise 3, solution
def rescaled(told, guided, share=0.7):
    axes = (1, 2, 3, 4)
    corrected = guided * told.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return share * corrected + (1 - share) * guided
