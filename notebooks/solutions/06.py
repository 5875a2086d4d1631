"""
Solutions of lesson 06, and usual mistakes, which the lesson must notice. The tests put each into
the lesson. They need the names that the lesson has defined up to there.
"""

# Exercise 1, mistake: a window makes `overlap` frames
def evaluations(n, length, overlap, steps, T=8):
    return (1 + -(-max(length - T, 0) // overlap)) * steps

# Exercise 1, mistake: rounded down
def evaluations(n, length, overlap, steps, T=8):
    return (1 + max(length - T, 0) // (T - overlap)) * steps

# Exercise 1, mistake: the first window as the others
def evaluations(n, length, overlap, steps, T=8):
    return -(-(length - n) // (T - overlap)) * steps

# Exercise 1, solution
def evaluations(n, length, overlap, steps, T=8):
    missing = max(length - T, 0)                                            # after the first window
    windows = 1 + -(-missing // (T - overlap))
    return windows * steps

# Exercise 2, mistake: every frame waits for the one before
def in_groups(sigmas, frames, group):
    steps = len(sigmas) - 1
    made = torch.arange(steps * frames + 1)[:, None] - steps * torch.arange(frames)
    return sigmas[made.clamp(0, steps)]

# Exercise 2, mistake: the last row is missing
def in_groups(sigmas, frames, group):
    steps = len(sigmas) - 1
    rows = steps * -(-frames // group)
    made = torch.arange(rows)[:, None] - steps * (torch.arange(frames) // group)
    return sigmas[made.clamp(0, steps)]

# Exercise 2, mistake: the smaller group is forgotten
def in_groups(sigmas, frames, group):
    steps = len(sigmas) - 1
    rows = steps * (frames // group) + 1
    made = torch.arange(rows)[:, None] - steps * (torch.arange(frames) // group)
    return sigmas[made.clamp(0, steps)]

# Exercise 2, solution
def in_groups(sigmas, frames, group):
    steps = len(sigmas) - 1
    rows = steps * -(-frames // group) + 1
    made = torch.arange(rows)[:, None] - steps * (torch.arange(frames) // group)
    made = made.clamp(0, steps)
    return sigmas[made]

# Exercise 3, mistake: the model is given nothing
@torch.no_grad()
def own_frames(denoise, clips, sigmas, noise):
    drawn = vdm.sample_dpmpp_2m(denoise, sigmas[0] * noise, sigmas)
    return torch.cat([drawn[:, 4:], clips[:, 8:]], dim=1)

# Exercise 3, mistake: the target is spoilt
@torch.no_grad()
def own_frames(denoise, clips, sigmas, noise):
    mask = (torch.arange(8) < 4).float().expand(len(clips), 8)
    told = partial(denoise, context=clips[:, :8], mask=mask)
    drawn = vdm.sample_dpmpp_2m(told, sigmas[0] * noise, sigmas)
    context = clips[:, 4:]
    context[:, :4] = drawn[:, 4:]
    return context

# Exercise 3, mistake: the frames that were given, not those that were drawn
@torch.no_grad()
def own_frames(denoise, clips, sigmas, noise):
    mask = (torch.arange(8) < 4).float().expand(len(clips), 8)
    told = partial(denoise, context=clips[:, :8], mask=mask)
    drawn = vdm.sample_dpmpp_2m(told, sigmas[0] * noise, sigmas)
    return torch.cat([drawn[:, :4], clips[:, 8:]], dim=1)

# Exercise 3, solution
@torch.no_grad()
def own_frames(denoise, clips, sigmas, noise):
    mask = (torch.arange(8) < 4).float().expand(len(clips), 8)
    told = partial(denoise, context=clips[:, :8], mask=mask)
    drawn = vdm.sample_dpmpp_2m(told, sigmas[0] * noise, sigmas)
    context = torch.cat([drawn[:, 4:], clips[:, 8:]], dim=1)
    return context
