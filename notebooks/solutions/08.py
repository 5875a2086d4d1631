"""
Solutions of lesson 08, and usual mistakes, which the lesson must notice. The tests put each into
the lesson. They need the names that the lesson has defined up to there.
"""

# Exercise 1, mistake: the mean of the batches' figures
def measure_in_batches(batches):
    found = [(z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))) for z in batches]
    mean, deviation = (torch.stack(part).mean(0)[:, None, None] for part in zip(*found))
    return mean, deviation

# Exercise 1, mistake: one number for all channels
def measure_in_batches(batches):
    z = torch.cat(list(batches))
    return z.mean(), z.std()

# Exercise 1, mistake: the mean is not subtracted
def measure_in_batches(batches):
    z = torch.cat(list(batches))
    squares = z.square().mean(dim=(0, 2, 3))
    return z.mean(dim=(0, 2, 3))[:, None, None], squares.sqrt()[:, None, None]

# Exercise 1, mistake: the right mean, but the mean of the batches' deviations
def measure_in_batches(batches):
    batches = list(batches)
    weights = torch.tensor([len(z) for z in batches]) / sum(len(z) for z in batches)
    mean = sum(w * z.mean(dim=(0, 2, 3)) for w, z in zip(weights, batches))
    deviation = sum(w * z.std(dim=(0, 2, 3)) for w, z in zip(weights, batches))
    return mean[:, None, None], deviation[:, None, None]

# Exercise 1, solution
def measure_in_batches(batches):
    count = 0
    total = 0
    squares = 0
    for z in batches:
        count += z[:, 0].numel()
        total = total + z.double().sum(dim=(0, 2, 3))
        squares = squares + z.double().square().sum(dim=(0, 2, 3))
    mean = total / count
    deviation = (squares / count - mean ** 2).sqrt()
    return mean.float()[:, None, None], deviation.float()[:, None, None]

# Exercise 2, mistake: changes the caller's latents
def frames_touched(decode, latents, t):
    before = decode(latents)
    latents[:, t] += 1
    return int((decode(latents) != before).flatten(2).any(2).sum())

# Exercise 2, mistake: nothing is changed
def frames_touched(decode, latents, t):
    return int((decode(latents.clone()) != decode(latents)).flatten(2).any(2).sum())

# Exercise 2, mistake: pixels are counted
def frames_touched(decode, latents, t):
    changed = latents.clone()
    changed[:, t] += 1
    return int((decode(changed) != decode(latents)).sum())

# Exercise 2, mistake: only frames after t
def frames_touched(decode, latents, t):
    changed = latents.clone()
    changed[:, t] += 1
    return int((decode(changed) != decode(latents)).flatten(2).any(2)[:, t:].sum())

# Exercise 2, mistake: twice the reach and one, at the edge, too
def frames_touched(decode, latents, t):
    changed = latents.clone()
    changed[:, t] += 1
    after = (decode(changed) != decode(latents)).flatten(2).any(2)[:, t:].sum()
    return int(2 * after - 1)

# Exercise 2, solution
def frames_touched(decode, latents, t):
    changed = latents.clone()
    changed[:, t] += 1
    return int((decode(changed) != decode(latents)).flatten(2).any(2).sum())

# Exercise 3, mistake: channels before time
def read_off_at_once(hw, tw, th):
    return hw[:, :, None] + tw[:, :, :, None] + th[:, :, :, :, None]

# Exercise 3, mistake: two planes have changed places
def read_off_at_once(hw, tw, th):
    u = hw[:, :, None] + tw[:, :, :, :, None] + th[:, :, :, None]
    return u.transpose(1, 2)

# Exercise 3, mistake: a plane is missing
def read_off_at_once(hw, tw, th):
    return (hw[:, :, None] + tw[:, :, :, None]).transpose(1, 2)

# Exercise 3, solution
def read_off_at_once(hw, tw, th):
    u = hw[:, :, None] + tw[:, :, :, None] + th[:, :, :, :, None]                # (B, C, T, H, W)
    return u.transpose(1, 2)
