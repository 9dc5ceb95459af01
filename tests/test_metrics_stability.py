"""Stability under noise, and the randomisation of parameters: closed forms and spies."""

from copy import deepcopy

import pytest
import torch
from compare import assert_close
from measured import Named, class_maps, grad_cam

from cfcam_gpu import metrics

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (extra: metrics)")

pytestmark = pytest.mark.usefixtures("one_thread")


# Stability.


def test_gradient_noise_stability(seed):
    activations, gradients = torch.rand(3, 16, 8, 8), torch.rand(3, 16, 8, 8)
    gradients *= torch.tensor([1e-25, 1.0, 1e4])[:, None, None, None]
    stds, draws, seen = [0.0, 0.5, 2.0], 4, []

    def method(given, noisy):
        assert given is activations
        maps = grad_cam(activations, noisy)
        seen.append((noisy, maps))
        return maps

    def run(method, seed=3):
        generator = torch.Generator().manual_seed(seed)
        return metrics.gradient_noise_stability(
            activations, gradients, method, stds, draws=draws, generator=generator
        ).ssim

    result = run(method)
    (clean, clean_maps), noisy = seen[0], seen[1:]
    assert torch.equal(clean, gradients) and len(noisy) == draws * len(stds)
    for column, std in enumerate(stds):
        noises, maps = zip(*noisy[column :: len(stds)])
        expected = sum(metrics.ssim(clean_maps, each) for each in maps) / draws
        assert_close(result[:, column], expected)
        noise = torch.stack(noises).double() - gradients.double()
        rms = gradients.double().square().mean((1, 2, 3)).sqrt()
        # 4096 numbers per image, so the measured deviation is within 5% (4.5 of its own standard deviations).
        assert ((noise.square().mean((0, 2, 3, 4)).sqrt() / rms - std).abs() <= 0.05 * std).all()
        assert (noise.mean((0, 2, 3, 4)).abs() <= 0.1 * std * rms).all()
        assert std == 0 or len({each.double().sum().item() for each in noises}) == draws
    assert_close(result[:, 0], [1, 1, 1])
    assert (result[:, 2] < result[:, 1]).all() and (result[:, 1] < 0.9999).all()
    assert torch.equal(run(grad_cam), result) and not torch.equal(run(grad_cam, seed=4), result)
    assert_close(run(lambda given, noisy: grad_cam(given, given)), torch.ones(3, 3))  # what ignores the gradient


def test_noise_stability_of_zero_maps_is_no_number(seed):
    activations, gradients = torch.rand(3, 16, 8, 8), torch.rand(3, 16, 8, 8)
    gradients[1] *= -1  # Grad-CAM's map is then zero
    result = metrics.gradient_noise_stability(activations, gradients, grad_cam, [0.5, 1.0], draws=1)
    assert result.zero.tolist() == [False, True, False]
    assert torch.equal(result.ssim.isnan(), result.zero[:, None].expand(3, 2))


def test_input_noise_stability(seed):
    images, seen = torch.randn(2, 3, 32, 32) * torch.tensor([0.1, 5.0])[:, None, None, None] + 7, []

    def maps_of(noisy):
        assert torch.is_grad_enabled()  # other libraries' maps need autograd
        seen.append(noisy)
        return (noisy.mean(1) / noisy.mean(1).abs().amax((1, 2), keepdim=True) + 1) / 2

    result = metrics.input_noise_stability(maps_of, images, [0.3, 3.0], draws=2)
    noise = torch.stack(seen[1:]).unflatten(0, (2, 2)) - images  # draw, std, image
    actual = noise.square().mean((0, 3, 4, 5)).sqrt() / images.std((1, 2, 3))
    assert ((actual / torch.tensor([[0.3], [3.0]]) - 1).abs() < 0.05).all()
    assert result.ssim.shape == (2, 2) and (result.ssim[:, 1] < result.ssim[:, 0]).all()
    assert not result.zero.any()


# Parameter randomisation.


CHILDREN = ("head", "scale", "norm", "stem")


@pytest.mark.parametrize("cascading", [True, False])
def test_parameter_randomization_changes_these_layers_and_no_others(seed, cascading):
    model, changes = Named().eval(), []
    state, random_state = deepcopy(model.state_dict()), torch.get_rng_state()

    def spy(copy, images):
        assert copy is not model and not copy.training
        kept = {name: torch.equal(value, state[name]) for name, value in copy.state_dict().items()}
        changes.append({name for name in CHILDREN if not all(v for k, v in kept.items() if k.startswith(name))})
        return torch.rand(2, 30, 30, generator=torch.Generator().manual_seed(0))

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    result = metrics.parameter_randomization(spy, model, images, cascading=cascading)
    assert result.layers == CHILDREN
    expected = [set(CHILDREN[: index + 1]) if cascading else {name} for index, name in enumerate(CHILDREN)]
    assert changes == [set(), *expected]
    assert_close(result.ssim, torch.ones(2, 4))  # the spy's map survives everything, and is found out
    assert_close(result.rank, torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_parameter_randomization_of_maps_that_depend_on_the_weights(seed):
    model, images = Named().eval(), torch.randn(3, 3, 32, 32)
    result = metrics.parameter_randomization(class_maps, model, images, seed=5)
    assert result.ssim.shape == result.rank.shape == result.zero.shape == (3, 4)
    assert not result.zero.any()
    assert (result.ssim < 0.99).all() and (result.rank < 0.99).all()
    again, other = (metrics.parameter_randomization(class_maps, model, images, seed=each) for each in (5, 6))
    assert torch.equal(result.ssim, again.ssim) and torch.equal(result.rank, again.rank)
    assert not torch.equal(result.ssim, other.ssim)
    only = metrics.parameter_randomization(class_maps, model, images, ["stem"], seed=5)
    assert only.layers == ("stem",) and only.ssim.shape == (3, 1)

    def dead(copy, images):
        return class_maps(copy, images) * float(torch.equal(copy.head.weight, model.head.weight))

    gone = metrics.parameter_randomization(dead, model, images, ["stem", "head"])
    assert not gone.zero[:, 0].any() and gone.zero[:, 1].all() and gone.ssim[:, 1].isnan().all()


def test_bare_parameters_keep_their_mean_and_spread(seed):
    model, factors = Named().eval(), []
    metrics.parameter_randomization(
        lambda copy, images: factors.append(copy.scale.factor.detach().clone()) or torch.rand(1, 8, 8),
        model,
        torch.randn(1, 3, 32, 32),
        ["scale"],
    )
    before, after = factors
    assert not torch.allclose(before, after, atol=0.01)
    assert abs(after.mean() - before.mean()) < 0.01 and abs(after.std() / before.std() - 1) < 0.05
