"""The random numbers of a model's pass: whether it draws any, and to draw them again."""

import torch


def random_state(device):
    """The states of the generators that a model on this device draws from, the CPU's first."""
    states = [torch.get_rng_state()]
    if device.type in ("cuda", "xpu"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def restore_random_state(device, states):
    """Undoes what was drawn since `random_state` gave ``states``."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


def same_state(states, others):
    """Whether nothing was drawn between two calls of `random_state`."""
    return all(map(torch.equal, states, others))
