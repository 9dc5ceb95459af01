"""Calls in several threads at once, beside plain inference on the same model: every result is the sequential one."""

import asyncio
import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from functools import partial

import pytest
import torch
from networks import vit
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, ResNet

from cfcam_gpu import CFCAM, CFCAMConfig, calls
from cfcam_gpu.calls import EAGER, UNFUSED, Call
from cfcam_gpu.capture import HeadCapture
from cfcam_gpu.labels import DOMINANT

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:maps are zero everywhere"),  # random networks
]

N_THREADS, N_CALLS = 8, 500


def to_map(tokens):
    side = int((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def networks():
    """Name -> model, target layer, reshape transform, sizes of images that it takes."""
    resnet = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7).eval()
    transformer = vit(48, layers=2)
    return {
        "resnet": (resnet, resnet.layer4, None, [(48, 48), (64, 40), (33, 70)]),
        "vit": (transformer, transformer.encoder.layers[1].ln_1, to_map, [(48, 48)]),
    }


def jobs(rng, sizes, n=12):
    """Input, targets and keywords of calls: indices, the top class, several classes, callables, and bad ones."""
    for index in range(n):
        batch, size = 1 + index % 2, sizes[index % len(sizes)]
        images = torch.from_numpy(rng.standard_normal((batch, 3, *size))).float()
        yield (
            images,
            *[
                (rng.integers(0, 7, batch).tolist(), None),
                (None, None),
                (None, 3),
                ([partial(chosen, index % 5)] * batch, None),
                ([10_000] * batch, None),  # out of range
                ([fails] * batch, None),
            ][index % 6],
        )


def chosen(index, output):
    return output[index] - output.mean()


def fails(output):
    raise LookupError("of the target's own")


def explain(cam, job):
    try:
        explained = cam.explain(*job)
    except (ValueError, LookupError) as error:
        return type(error)
    assert cam.outputs is explained.outputs
    return explained


def is_same(found, expected):
    if isinstance(expected, type):
        return found is expected
    names = ("maps", "outputs", "labels", "weights")
    return all(torch.equal(getattr(found, name), getattr(expected, name)) for name in names)


@pytest.mark.parametrize("shared", [True, False], ids=["one object", "one each"])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_many_calls_in_eight_threads(name, shared, rng, seed):
    model, layer, reshape, sizes = networks()[name]
    made = partial(CFCAM, model, [layer], reshape)
    todo = list(jobs(rng, sizes))
    expected = [explain(made(), job) for job in todo]
    assert {LookupError, ValueError} <= {each for each in expected if isinstance(each, type)}
    of_all, of_thread = made(), threading.local()

    def call(index):
        if not hasattr(of_thread, "cam"):
            of_thread.cam = of_all if shared else made()
        return is_same(explain(of_thread.cam, todo[index]), expected[index])

    order = rng.integers(0, len(todo), N_CALLS // 2).tolist()  # as many with one object as with one for each thread
    with ThreadPoolExecutor(N_THREADS) as pool:
        assert all(pool.map(call, order[: len(order) // 2]))
        n_tensors = count_tensors()
        assert all(pool.map(call, order[len(order) // 2 :]))
        # A thread keeps the outputs of its latest call, and nothing more.
        assert count_tensors() <= n_tensors + 2 * N_THREADS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def count_tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_plain_inference_beside(name, rng, seed):
    model, layer, reshape, sizes = networks()[name]
    images, others = torch.from_numpy(rng.standard_normal((2, 1, 3, *sizes[0]))).float()
    with torch.no_grad():
        plain = model(images)
    with torch.inference_mode():
        served = model(images)
    expected = CFCAM(model, [layer], reshape).maps(others, [1])
    done, n_wrong = threading.Event(), []

    def infer(mode, expected):
        n_passes = 0
        while not done.is_set() or not n_passes:
            with mode():
                output = model(images)
                # Attention takes the fused path as ever, which rounds otherwise: to the bit.
                same = torch.equal(output, expected) and not output.requires_grad and not torch.is_grad_enabled()
            n_wrong.append(not same)
            n_passes += 1

    with ThreadPoolExecutor(3) as pool:
        beside = [pool.submit(infer, torch.no_grad, plain), pool.submit(infer, torch.inference_mode, served)]
        cam = CFCAM(model, [layer], reshape)
        try:
            assert all(torch.equal(cam.maps(others, [1]), expected) for _ in range(20))
        finally:
            done.set()
        for each in beside:
            each.result()
    assert sum(n_wrong) == 0


class Stops(nn.Module):
    """A network that stops before its layer, and behind it, as long as it is told to."""

    def __init__(self):
        super().__init__()
        self.before, self.behind = Stop(), Stop()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.behind(self.body(self.before(x))).mean((2, 3)))


class Stop(nn.Module):
    def __init__(self):
        super().__init__()
        self.thread, self.arrived, self.go_on = None, threading.Event(), threading.Event()

    def forward(self, x):
        if self.thread is threading.current_thread():
            self.arrived.set()
            assert self.go_on.wait(30)
        return x


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_pass_between_the_hooks_of_another(where, rng):
    model = Stops().eval()
    images, others = torch.from_numpy(rng.standard_normal((2, 2, 3, 16, 16))).float()
    config = CFCAMConfig(margin_temperature=0)
    expected = [CFCAM(model, [model.body], config=config).explain(*job) for job in ((images, [1, 2]), (others, [3, 0]))]
    cam, stop, found = CFCAM(model, [model.body], config=config), getattr(model, where), []
    stop.thread = threading.Thread(target=lambda: found.append(cam.explain(images, [1, 2])))
    stop.thread.start()
    try:
        assert stop.arrived.wait(30)
        # Now the other thread's hooks are on the model. Inference, training and another explanation see none of them.
        with torch.no_grad():
            output = model(others)
            assert torch.equal(output, expected[1].outputs) and not output.requires_grad
        model(others).sum().backward()
        assert model.body[0].weight.grad is not None
        assert is_same(cam.explain(others, [3, 0]), expected[1])
        assert torch.equal(cam.outputs, expected[1].outputs) and cam.classes.tolist() == [3, 0]
    finally:
        stop.go_on.set()
        stop.thread.join()
    assert is_same(found[0], expected[0])
    assert torch.equal(cam.outputs, expected[1].outputs), "the calling thread's latest call"


def test_a_target_may_run_the_model(rng):
    """Plain inference and another explanation, by a callable in the middle of a call."""
    model = Stops().eval()
    images = torch.from_numpy(rng.standard_normal((1, 3, 16, 16))).float()
    cam = CFCAM(model, [model.body])
    reference = cam.explain(images, [2])

    def nearness(output):
        with torch.no_grad():
            plain = model(images)[0]
        assert not plain.requires_grad
        assert is_same(cam.explain(images, [2]), reference)
        return (output * plain).sum()

    plain = reference.outputs[0]
    expected = cam.maps(images, [lambda output: (output * plain).sum()])
    assert torch.equal(cam.maps(images, [nearness]), expected)


@pytest.mark.parametrize("switch", [EAGER, UNFUSED])
def test_switches_of_the_process_after_overlapping_calls(switch):
    before, seen = torch.backends.mha.get_fastpath_enabled(), []
    first, second = switch.on(), switch.on()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    seen.append((torch.backends.mha.get_fastpath_enabled(), stance()))
    second.__exit__(None, None, None)
    assert seen == [(before, "force_eager") if switch is EAGER else (False, "default")]
    assert (torch.backends.mha.get_fastpath_enabled(), stance()) == (before, "default")


def stance():
    return torch._dynamo.eval_frame._stance.stance


class Watches(nn.Module):
    """Notes what is switched for the process while it runs."""

    def __init__(self):
        super().__init__()
        self.attention, self.head, self.seen = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3), []

    def forward(self, x):
        self.seen.append((torch.backends.mha.get_fastpath_enabled(), stance()))
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_nothing_is_switched_for_other_threads():
    model = Watches().eval()
    CFCAM(model, [model.attention], lambda x: x.transpose(1, 2).unflatten(2, (3, 3))).maps(torch.randn(1, 9, 8), [0])
    assert model.seen == [(True, "default")]
    model.compile()  # compiled code would pass the hooks by: it must wait
    model.seen.clear()
    CFCAM(model, [model.attention], lambda x: x.transpose(1, 2).unflatten(2, (3, 3))).maps(torch.randn(1, 9, 8), [0])
    assert model.seen == [(True, "force_eager")] and stance() == "default"


def test_a_layer_in_a_compiled_function(rng):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Linear(8, 4)
            self.features = lambda x: self.body(x)

        def forward(self, x):
            return self.head(self.features(x).mean((2, 3)))

    model = Model().eval()
    images = torch.from_numpy(rng.standard_normal((2, 3, 12, 12))).float()
    expected = CFCAM(model, [model.body]).maps(images, [1, 3])
    model.features = torch.compile(model.features, backend="eager")
    for compiled_before in (False, True):  # not yet, and by then
        cam = CFCAM(model, [model.body])
        assert torch.equal(cam.maps(images, [1, 3]), expected), compiled_before
        with torch.no_grad():
            assert not model(images).requires_grad
    torch.compiler.reset()


def test_autograd_threads_of_a_backward_belong_to_the_call():
    """As on accelerators, where autograd has a thread of its own for checkpointing's second forward."""
    call, other, ran = Call(), Call(), []

    class Recomputes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            here, calls._HERE.call = calls._HERE.call, None  # in another thread nothing is open
            ran.extend([call.only(lambda: "of this")(), other.only(lambda: "of another")()])
            calls._HERE.call = here
            return gradient

    leaf = torch.ones((), requires_grad=True)
    root = Recomputes.apply(leaf) * 2
    with call, call.backward_from(root):
        torch.autograd.grad(root, leaf)
    assert ran == ["of this", None]
    with call:
        torch.autograd.grad(Recomputes.apply(leaf) * 2, leaf)
    assert ran[2:] == [None, None], "another backward"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_threads(reentrant, rng):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.more = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

        def forward(self, x):
            return checkpoint(self.more, self.body(x), use_reentrant=reentrant).mean((2, 3))

    model = Model().eval()
    images = torch.from_numpy(rng.standard_normal((2, 3, 16, 16))).float()
    layers = [model.body] if reentrant else [model.body, model.more[1]]
    head = HeadCapture(model, layers[:1])
    if reentrant:  # autograd.grad refuses it; what matters is that the hooks go
        with pytest.raises(RuntimeError):
            head(images, [1, 2])
    else:
        expected = head(images, [1, 2]).gradients[0]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: head(images, [1, 2]).gradients[0], range(16)))
        assert all(torch.equal(each, expected) for each in found)
    assert not any(module._forward_hooks for module in model.modules())


def test_asyncio(rng):
    model, layer, reshape, sizes = networks()["resnet"]
    cam = CFCAM(model, [layer], reshape)
    images = torch.from_numpy(rng.standard_normal((6, 1, 3, *sizes[0]))).float()
    expected = [cam.maps(each, [1]) for each in images]

    async def serve():
        return await asyncio.gather(*(asyncio.to_thread(cam.maps, each, [1]) for each in images))

    assert all(map(torch.equal, asyncio.run(serve()), expected))


# What a call hands back.


def test_an_explanation(rng):
    model, layer, reshape, sizes = networks()["resnet"]
    images = torch.from_numpy(rng.standard_normal((2, 3, *sizes[0]))).float()
    cam = CFCAM(model, [layer])
    assert cam.outputs is None and cam.classes is None
    for targets, top, shape in (([1, 2], None, (2,)), (None, None, (2,)), (None, 3, (2, 3))):
        found = cam.explain(images, targets, top)
        assert torch.equal(found.maps, cam.maps(images, targets, top)) and found.maps.shape == (*shape, *sizes[0])
        assert torch.equal(found.outputs, model(images)) and not found.outputs.requires_grad
        assert found.targets.shape == shape and torch.equal(found.targets, cam.classes)
        assert found.labels.shape == (2, 512) and found.labels.dtype == torch.int32
        assert (found.labels == DOMINANT).any() and found.weights.shape == (*shape, 512)
    with pytest.raises(FrozenInstanceError):
        found.maps = None
    callables = [lambda output: output[0]] * 2
    assert cam.explain(images, callables).targets is callables and cam.classes is None

    several = CFCAM(model, [model.layer3, layer]).explain(images, [1, 2])
    assert [each.shape for each in several.labels] == [(2, 256), (2, 512)] == [each.shape for each in several.weights]
    assert torch.equal(several.labels[1], cam.explain(images, [1, 2]).labels)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cam: pickle.loads(pickle.dumps(cam))])
def test_copies(copied, rng):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    cam, images = CFCAM(model.eval(), [model[1]]), torch.from_numpy(rng.standard_normal((2, 3, 12, 12))).float()
    expected = cam.maps(images, [1, 2])
    other = copied(cam)
    assert other.outputs is None and torch.equal(other.maps(images, [1, 2]), expected)
