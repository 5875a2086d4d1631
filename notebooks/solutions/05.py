"""
Solutions of lesson 05, and usual mistakes, which the lesson must notice. The tests put each into
the lesson. They need the names that the lesson has defined up to there.
"""

# Exercise 1, mistake: one random number a frame
def both_ends(batch, frames, odds):
    mask = torch.zeros(batch, frames)
    mask[:, [0, -1]] = (torch.rand(batch, 2) < odds).float()
    return mask

# Exercise 1, mistake: always
def both_ends(batch, frames, odds):
    mask = torch.zeros(batch, frames)
    mask[:, [0, -1]] = 1
    return mask

# Exercise 1, mistake: whole clips
def both_ends(batch, frames, odds):
    mask = torch.zeros(batch, frames)
    mask[torch.rand(batch) < odds] = 1
    return mask

# Exercise 1, solution
def both_ends(batch, frames, odds):
    mask = torch.zeros(batch, frames)
    mask[:, [0, -1]] = (torch.rand(batch, 1) < odds).float()
    return mask

# Exercise 2, mistake: scaled like noisy frames
def per_frame(x, sigma, context, mask):
    levels = sigma[:, None] * (1 - mask)
    frames = torch.where(mask[:, :, None, None, None] == 1, context, x)
    return frames / (1 + sigma[:, None, None, None, None] ** 2).sqrt(), levels

# Exercise 2, mistake: the level of the clip for all
def per_frame(x, sigma, context, mask):
    levels = sigma[:, None].expand(mask.shape)
    frames = torch.where(mask[:, :, None, None, None] == 1, context, x)
    return frames / (1 + levels[:, :, None, None, None] ** 2).sqrt(), levels

# Exercise 2, mistake: context does not enter
def per_frame(x, sigma, context, mask):
    levels = sigma[:, None] * (1 - mask)
    return x / (1 + levels[:, :, None, None, None] ** 2).sqrt(), levels

# Exercise 2, solution
def per_frame(x, sigma, context, mask):
    levels = sigma[:, None] * (1 - mask)
    frames = torch.where(mask[:, :, None, None, None] == 1, context, x)
    scaled = frames / (1 + levels[:, :, None, None, None] ** 2).sqrt()
    return scaled, levels

# Exercise 3, mistake: fresh noise on every frame
def beside(picture, T, level):
    frames = picture.expand(-1, T, -1, -1, -1)
    frames = frames + level[:, None, None, None, None] * torch.randn_like(frames)
    return torch.cat([frames, torch.ones_like(frames[:, :, :1])], dim=2)

# Exercise 3, mistake: noise on the mask
def beside(picture, T, level):
    shown = torch.cat([picture, torch.ones_like(picture[:, :, :1])], dim=2)
    shown = shown + level[:, None, None, None, None] * torch.randn_like(shown)
    return shown.expand(-1, T, -1, -1, -1)

# Exercise 3, mistake: no noise
def beside(picture, T, level):
    frames = picture.expand(-1, T, -1, -1, -1)
    return torch.cat([frames, torch.ones_like(frames[:, :, :1])], dim=2)

# Exercise 3, solution
def beside(picture, T, level):
    noisy = picture + level[:, None, None, None, None] * torch.randn_like(picture)
    frames = noisy.expand(-1, T, -1, -1, -1)
    return torch.cat([frames, torch.ones_like(frames[:, :, :1])], dim=2)
