"""
Solutions of lesson 07, and usual mistakes, which the lesson must notice. The tests put each into
the lesson. They need the names that the lesson has defined up to there.
"""

# Exercise 1, mistake: upside down
def mirror(video, action):
    return video.flip(-2), action

# Exercise 1, mistake: the pixels alone
def mirror(video, action):
    return video.flip(-1), action

# Exercise 1, mistake: the motion is the old one
def mirror(video, action):
    return video.flip(-1), action[:, [2, 1, 0, 3, 4, 5]]

# Exercise 1, mistake: writes into what it was given
def mirror(video, action):
    action[:, 5] *= -1
    return video.flip(-1), action

# Exercise 1, mistake: a swap of two views copies one over the other
def mirror(video, action):
    new_action = action.clone()
    new_action[:, 0], new_action[:, 2] = new_action[:, 2], new_action[:, 0]
    new_action[:, 5] *= -1
    return video.flip(-1), new_action

# Exercise 1, solution
def mirror(video, action):
    new_action = action[:, [2, 1, 0, 3, 4, 5]]                             # a copy, L and R exchanged
    new_action[:, 5] *= -1                                                     # right is now left
    return video.flip(-1), new_action

# Exercise 2, mistake: zeros
def tell_only(action, sizes, which):
    first = sum(sizes[:which])
    alone = torch.zeros_like(action)
    alone[..., first:first + sizes[which]] = action[..., first:first + sizes[which]]
    return alone

# Exercise 2, mistake: the other way round
def tell_only(action, sizes, which):
    first = sum(sizes[:which])
    alone = action.clone()
    alone[..., first:first + sizes[which]] = nan
    return alone

# Exercise 2, mistake: writes into what it was given
def tell_only(action, sizes, which):
    first = sum(sizes[:which])
    action[..., :first] = nan
    action[..., first + sizes[which]:] = nan
    return action

# Exercise 2, mistake: cuts the rest off
def tell_only(action, sizes, which):
    first = sum(sizes[:which])
    return action[..., first:first + sizes[which]]

# Exercise 2, solution
def tell_only(action, sizes, which):
    first = sum(sizes[:which])
    last = first + sizes[which]
    alone = torch.full_like(action, nan)
    alone[..., first:last] = action[..., first:last]
    return alone

# Exercise 3, mistake: the free estimate is not given the frames
def action_guided(denoise, scale):
    def denoise_guided(x, sigma, action, **conditions):
        free = denoise(x, sigma)
        told = denoise(x, sigma, action=action, **conditions)
        return free + scale * (told - free)
    return denoise_guided

# Exercise 3, mistake: zeros are told
def action_guided(denoise, scale):
    def denoise_guided(x, sigma, action, **conditions):
        free = denoise(x, sigma, action=torch.zeros_like(action), **conditions)
        told = denoise(x, sigma, action=action, **conditions)
        return free + scale * (told - free)
    return denoise_guided

# Exercise 3, mistake: starts from told
def action_guided(denoise, scale):
    def denoise_guided(x, sigma, action, **conditions):
        free = denoise(x, sigma, action=torch.full_like(action, nan), **conditions)
        told = denoise(x, sigma, action=action, **conditions)
        return told + scale * (told - free)
    return denoise_guided

# Exercise 3, solution
def action_guided(denoise, scale):
    def denoise_guided(x, sigma, action, **conditions):
        free = denoise(x, sigma, action=torch.full_like(action, nan), **conditions)
        told = denoise(x, sigma, action=action, **conditions)
        return free + scale * (told - free)
    return denoise_guided
