"""HeadCapture against plain full backwards: same bits, nothing left on the model, errors that say why."""

import collections
import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cfcam_gpu.capture import HeadCapture, find_module_name

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


@pytest.fixture(scope="module")
def one_thread():
    """Small models gain nothing from threads, and lose a factor of ten where other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Small classifier; ``trunk`` gives (B, 6, 6, 5), and what follows it is ``head``."""

    def __init__(self, n_classes=4, inplace=True):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1))
        self.head = nn.Sequential(nn.ReLU(inplace), nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, n_classes)

    def forward(self, x):
        return self.fc(self.head(self.trunk(x)))


class Passes(nn.Module):
    """Calls ``function(self, x)`` as its forward and counts the calls; the modules given are its children."""

    def __init__(self, function, **children):
        super().__init__()
        self.function, self.runs = function, 0
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        self.runs += 1
        return self.function(self, x)


def conv(channels_in=3, channels=6):
    return nn.Conv2d(channels_in, channels, 3, padding=1)


def images(batch=2, size=(8, 7)):
    return torch.randn(batch, 3, *size)


def total(targets):
    """The score of a list of class indices, written independently of the code under test."""
    return lambda outputs: sum(outputs[row, target] for row, target in enumerate(targets))


def full_backward(model, layers, x, score, transform=lambda t: t):
    """Outputs, activations and gradients of a plain forward and a backward through everything."""
    activations, gradients = {}, {}

    def keep(layer, inputs, output):
        first = output[0] if isinstance(output, (tuple, list)) else output
        activation = activations[layer] = first.detach().clone()

        def keep_gradient(gradient):
            if activations[layer] is activation:  # this was the layer's last call
                gradients[layer] = gradient.clone()

        first.register_hook(keep_gradient)

    handles = [layer.register_forward_hook(keep) for layer in dict.fromkeys(layers)]
    outputs = model(x.detach().clone().requires_grad_())  # a frozen model has a graph only through its input
    for handle in handles:
        handle.remove()
    score(outputs).backward()
    model.zero_grad(set_to_none=True)
    return outputs, *([transform(kept[layer]) for layer in layers] for kept in (activations, gradients))


def assert_same(capture, expected):
    """Bit for bit; and the gradients are not trivially equal."""
    outputs, activations, gradients = expected
    assert torch.equal(capture.outputs, outputs)
    assert len(capture.activations) == len(capture.gradients) == len(activations)
    for ours, theirs in zip(capture.activations + capture.gradients, activations + gradients):
        assert ours.dtype == theirs.dtype and not ours.requires_grad and ours.grad_fn is None
        assert torch.equal(ours, theirs)
        assert ours.count_nonzero()


def check(model, layers, x, targets=(1, 3), transform=None, passes=1):
    """The capture equals the full backward, on every pass."""
    expected = full_backward(model, layers, x, total(targets), transform or (lambda t: t))
    head = HeadCapture(model, layers, transform)
    for _ in range(passes):
        assert_same(head(x, list(targets)), expected)


HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


@contextlib.contextmanager
def untouched(model, *tensors):
    """Asserts that the model, the tensors and the global modes are the same after the block as before it."""

    def state():
        values = [*model.named_parameters(), *model.named_buffers(), *enumerate(tensors)]
        objects = [(name, id(t), t.requires_grad, t.is_leaf, id(t.grad), t.grad_fn) for name, t in values]
        copies = [t.detach().clone() for _, t in values] + [t.grad.clone() for _, t in values if t.grad is not None]
        hooks = [(name, hook, dict(getattr(m, hook))) for name, m in model.named_modules() for hook in HOOKS]
        training = [(name, m.training) for name, m in model.named_modules()]
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.backends.mha.get_fastpath_enabled()
        return objects, hooks, training, modes, copies

    *before, copies = state()
    yield
    *after, copies_after = state()
    assert before == after
    assert all(torch.equal(a, b) for a, b in zip(copies, copies_after, strict=True))


def test_the_state_check_sees_a_hook_a_grad_and_a_flag():
    for disturb in (
        lambda m: m.fc.register_forward_hook(print),
        lambda m: setattr(m.fc.weight, "grad", torch.zeros_like(m.fc.weight)),
        lambda m: m.fc.train(not m.fc.training),
        lambda m: m.fc.requires_grad_(False),
        lambda m: m.fc.bias.data.add_(1),
    ):
        model = Net()
        with pytest.raises(AssertionError), untouched(model):
            disturb(model)


# Equal to a full backward


@pytest.mark.parametrize(
    "name, layer",
    [
        ("resnet18", "layer4.1"),  # residual blocks; the ReLU in the block is shared and in place
        ("resnet18", "layer3.1.bn1"),  # mid-network, an in-place ReLU follows
        ("densenet121", "features.norm5"),  # an in-place F.relu follows
        ("densenet121", "features.denseblock3"),  # a map with many readers: the order of the sum matters
        ("vgg16", "features.28"),  # the last convolution, an in-place ReLU follows
        ("vgg16", "features.29"),  # that in-place ReLU: output and input are one tensor
        ("mobilenet_v3_large", "features.16"),
    ],
)
def test_bit_identical_on_torchvision(name, layer):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    import networks

    model = networks.build(name)
    check(model, [model.get_submodule(layer)], images(2, (64, 96)), targets=(3, 800), passes=2)


def tokens_to_grid(rows, columns):
    """(B, 1 + rows * columns, C) with a class token -> (B, C, rows, columns)."""
    return lambda t: t[:, 1:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


def test_bit_identical_on_timm_vit():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=4).eval()
    check(model, [model.blocks[-1].norm1], images(2, (224, 224)), (3, 800), tokens_to_grid(14, 14))


@pytest.mark.parametrize("layer", ["ln_1", "self_attention"])
def test_bit_identical_on_torchvision_vit_also_where_the_layer_returns_a_tuple(layer):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model = models.VisionTransformer(32, 8, 3, 2, 32, 64, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero, and so every gradient
    check(model, [getattr(model.encoder.layers[1], layer)], images(2, (32, 32)), transform=tokens_to_grid(4, 4))


def test_the_fused_transformer_path_is_off_in_the_trunk():
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(
        nn.Sequential(nn.Flatten(2), encoder), nn.Unflatten(2, (3, 4)), nn.Flatten(), nn.Linear(5 * 12, 4)
    ).eval()
    x = torch.randn(2, 5, 3, 4)
    with torch.no_grad():
        fused = model[0](x)
    assert not torch.equal(fused, model[0](x))  # it rounds differently
    with untouched(model, x):
        check(model, [model[1]], x)


def test_pytorch_grad_cam_sees_the_same_tensors():
    library = pytest.importorskip("pytorch_grad_cam.activations_and_gradients", reason="grad-cam is not installed")
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model, x = models.resnet18().eval(), images(2, (64, 64))
    layers = [model.layer3[-1], model.layer4[-1]]
    theirs = library.ActivationsAndGradients(model, layers, None)
    outputs = theirs(x)
    total((5, 7))(outputs).backward()
    expected = outputs, tuple(theirs.activations), tuple(theirs.gradients)
    theirs.release()
    assert_same(HeadCapture(model, layers)(x, [5, 7]), expected)


def test_default_target_is_each_images_top_class():
    model, x = Net().eval(), images(5)
    top = model(x).argmax(1).tolist()
    assert_same(HeadCapture(model, [model.trunk])(x), full_backward(model, [model.trunk], x, total(top)))


@pytest.mark.parametrize(
    "targets",
    [
        (1, 3),
        [np.int64(1), np.int32(3)],
        np.array([1, 3]),
        torch.tensor([1, 3]),
        torch.tensor([1, 3], dtype=torch.int32),
        torch.tensor([1, 3], dtype=torch.uint8),
        [lambda output: output[1], lambda output: output[3:]],
    ],
    ids=["tuple", "numpy ints", "array", "int64", "int32", "uint8", "callables"],
)
def test_every_kind_of_target(targets):
    model, x = Net().eval(), images()
    assert_same(HeadCapture(model, [model.trunk])(x, targets), full_backward(model, [model.trunk], x, total((1, 3))))


# Several layers, several calls, tuples


@pytest.mark.parametrize(
    "names", [("trunk.0", "trunk"), ("trunk", "trunk.2"), ("head.1", "trunk.0", "head.0"), ("trunk", "trunk")]
)
def test_nested_repeated_and_unordered_layers(names):
    model = Net().eval()
    check(model, [model.get_submodule(name) for name in names], images(), passes=2)


@pytest.mark.parametrize("frozen", [False, True])
def test_parallel_branches(frozen):
    def forward(self, x):
        x = self.stem(x)
        return self.fc((self.left(x) * self.right(x).sigmoid()).mean((2, 3)))

    model = Passes(forward, stem=conv(), left=conv(6), right=conv(6), fc=nn.Linear(6, 4)).requires_grad_(not frozen)
    for layers in ([model.left, model.right], [model.right, model.left, model.stem], [model.right]):
        check(model, layers, images())


def repeated(relu):
    """Runs ``relu`` ``rounds`` times; ``graph`` tells after which of them autograd was on."""

    def forward(self, x):
        self.graph = []
        for layer in self.convs[: self.rounds]:
            x = self.relu(layer(x))
            self.graph.append(torch.is_grad_enabled())
        return self.fc(x.mean((2, 3)))

    model = Passes(forward, convs=nn.ModuleList([conv(), conv(6), conv(6)]), relu=relu, fc=nn.Linear(6, 4))
    model.rounds = 3
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_the_last_call_of_a_shared_layer_counts(inplace):
    model, x = repeated(nn.ReLU(inplace)), images()
    head = HeadCapture(model, [model.relu])

    def passes(rounds, runs, graph):
        model.rounds = rounds
        expected = full_backward(model, [model.relu], x, total((1, 3)))
        model.runs = 0
        assert_same(head(x, [1, 3]), expected)
        assert (model.runs, model.graph) == (runs, graph)

    passes(3, runs=1, graph=[True, True, True])  # not known yet which call is the last
    passes(3, runs=1, graph=[False, False, True])
    passes(2, runs=2, graph=[True, True])  # the awaited third call does not come: once more
    passes(2, runs=1, graph=[False, True])
    passes(3, runs=1, graph=[False, True, True])  # one more than awaited: the later call takes over


def test_shared_layer_among_others():
    model = repeated(nn.ReLU(inplace=True))
    check(model, [model.relu, model.convs[1]], images(), passes=3)
    check(model, [model.convs[2], model.relu], images(), passes=3)


Pair = collections.namedtuple("Pair", "features extra")


@pytest.mark.parametrize("container", [lambda t: (t, None), lambda t: [t, 1], lambda t: Pair(t, "x"), lambda t: (t,)])
@pytest.mark.parametrize("view", [False, True])
def test_layers_that_return_containers(container, view):
    block = Passes(lambda self, x: container(self.conv(x).transpose(2, 3) if view else self.conv(x)), conv=conv())

    def forward(self, x):
        output = self.block(x)
        assert type(output) is type(container(x)) and output[1:] == container(x)[1:]
        return self.fc(nn.functional.relu(output[0], inplace=self.inplace).mean((2, 3)))

    model, x = Passes(forward, block=block, fc=nn.Linear(6, 4)), images()
    model.inplace = False
    expected = full_backward(model, [block], x, total((1, 3)))
    model.inplace = True
    assert_same(HeadCapture(model, [block])(x, [1, 3]), expected)


def test_the_layer_may_give_the_final_output():
    model, x = conv(), images()
    capture = HeadCapture(model, [model])(x, [lambda output: output[0, 0, 0], lambda output: output.sum()])
    assert torch.equal(capture.outputs, model(x)) and torch.equal(capture.activations[0], model(x))
    expected = torch.zeros_like(capture.outputs)
    expected[0, 0, 0, 0], expected[1] = 1, 1
    assert torch.equal(capture.gradients[0], expected)


# In-place operations and shared storage


@pytest.mark.parametrize("layer", ["trunk", "trunk.1", "trunk.2"])
def test_in_place_after_the_layer_changes_nothing(layer):
    model, x = Net(inplace=True).eval(), images()
    twin = copy.deepcopy(model)
    twin.head[0].inplace = False
    ours = HeadCapture(model, [model.get_submodule(layer)])(x, [1, 3])
    assert ours.activations[0].min() < 0  # so that a ReLU on it would show
    assert_same(ours, full_backward(twin, [twin.get_submodule(layer)], x, total((1, 3))))


ALIASING = {
    "in place": Passes(lambda self, x: x.mul_(2)),
    "identity": nn.Identity(),
    "eval dropout": nn.Dropout().eval(),
    "view": nn.Flatten(1, 1),
    "transposed view": Passes(lambda self, x: x.transpose(2, 3)),
    "slice": Passes(lambda self, x: x[:, 1:5]),
    "chunk": Passes(lambda self, x: x.chunk(2, 1)),
    "expanded": Passes(lambda self, x: x[:, :1].expand(-1, 6, -1, -1)),
}


@pytest.mark.parametrize("kind", ALIASING)
@pytest.mark.parametrize("shallower", [False, True])
def test_layers_whose_output_shares_storage(kind, shallower):
    def forward(self, x):
        x = self.layer(self.conv(x))
        x = torch.cat(x, 1) if isinstance(x, tuple) else x
        if self.inplace and kind != "expanded":  # which nothing may write to
            x.mul_(3).sub_(1)
        else:
            x = x * 3 - 1
        return self.fc(x.square().mean((2, 3)).unflatten(1, (2, -1)).sum(2))

    model, x = Passes(forward, conv=conv(), layer=ALIASING[kind], fc=nn.Linear(2, 4)), images()
    layers = [model.layer] + [model.conv] * shallower
    model.inplace = False
    expected = full_backward(model, layers, x, total((1, 3)))
    model.inplace = True
    assert_same(HeadCapture(model, layers)(x, [1, 3]), expected)


def test_an_in_place_layer_counts_under_the_old_name_too():
    def forward(self, x):
        x = self.conv(x)
        skip = x
        self.relu(x)  # the returned value is dropped
        return self.fc((self.second(x) + skip).mean((2, 3)))

    model = Passes(forward, conv=conv(), relu=nn.ReLU(inplace=True), second=conv(6), fc=nn.Linear(6, 4))
    check(model, [model.relu], images(), passes=2)


def test_a_returned_buffer_is_given_back_as_it_was():
    layer = nn.Module()
    layer.register_buffer("grid", torch.randn(2, 6, 4, 4))
    layer.forward = lambda x: layer.grid
    model = Passes(lambda self, x: self.fc(self.layer(x).relu().mean((2, 3))), layer=layer, fc=nn.Linear(6, 4))
    with untouched(model):
        assert HeadCapture(model, [layer])(images()).gradients[0].count_nonzero()


def test_an_in_place_first_operation_leaves_the_input_alone():
    model, x = nn.Sequential(nn.ReLU(inplace=True), Net()).eval(), images()
    with untouched(model, x):
        HeadCapture(model, [model[0]])(x)


# Modes, dtypes and memory formats


def test_frozen_model():
    model = Net().eval().requires_grad_(False)
    check(model, [model.trunk], images())


def test_model_without_parameters():
    model = nn.Sequential(nn.AvgPool2d(2), nn.ReLU(inplace=True), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    check(model, [model[0]], images(), targets=(1, 2))


def test_model_with_offloaded_parameters():
    """Offloading libraries leave parameters on the meta device; the input must not follow them there."""
    net, x = Net().eval(), images()
    model = Passes(lambda self, x: self.net(x), offloaded=nn.Linear(2, 2, device="meta"), net=net)
    assert_same(HeadCapture(model, [net.trunk])(x, [1, 3]), full_backward(net, [net.trunk], x, total((1, 3))))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_mode_of_the_caller_with_the_input_made_inside(mode):
    model = Net().eval()
    with mode():
        x = images()
        with untouched(model, x):
            capture = HeadCapture(model, [model.trunk])(x, torch.tensor([1, 3]))
            capture = HeadCapture(model, [model.trunk])(x, [1, 3])
        assert not capture.outputs.is_inference()
    assert_same(capture, full_backward(model, [model.trunk], x.clone(), total((1, 3))))


def test_train_mode_is_kept():
    model, x = Net(), images()
    twin = copy.deepcopy(model)
    capture = HeadCapture(model, [model.trunk])(x, [1, 3])
    assert model.training and all(module.training for module in model.modules())
    assert_same(capture, full_backward(twin, [twin.trunk], x, total((1, 3))))
    assert torch.equal(model.trunk[1].running_mean, twin.trunk[1].running_mean)


def test_channels_last_is_kept_and_equals_contiguous():
    model, x = Net().eval(), images()
    plain = HeadCapture(model, [model.trunk])(x, [1, 3])
    model.to(memory_format=torch.channels_last)
    capture = HeadCapture(model, [model.trunk])(x.to(memory_format=torch.channels_last), [1, 3])
    assert capture.activations[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(capture.activations[0], plain.activations[0])  # another algorithm, so not bit for bit
    torch.testing.assert_close(capture.gradients[0], plain.gradients[0])
    check(model, [model.trunk], x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_other_dtypes(dtype):
    model = Net().eval().to(dtype)
    check(model, [model.trunk], images().to(dtype))


def test_autocast_applies_and_leaves_the_callers_weights_trainable():
    model, x = Net().eval(), images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = full_backward(model, [model.trunk], x, total((1, 3)))
        torch.clear_autocast_cache()
        capture = HeadCapture(model, [model.trunk])(x, [1, 3])
        assert_same(capture, expected)
        assert capture.activations[0].dtype == torch.bfloat16
        model(x).sum().backward()  # a cast weight left in the cache by the trunk would have no graph
    assert all(parameter.grad is not None for parameter in model.parameters())


# Models that switch autograd off themselves, checkpointing


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_trunk_that_switches_autograd_off(off):
    def forward(self, x):
        with off():
            x = self.net.trunk(x)
        return self.net.fc(self.net.head(x))

    net = Net().eval()
    model, x = Passes(forward, net=net), images()
    expected = full_backward(net, [net.trunk], x, total((1, 3)))
    head = HeadCapture(model, [net.trunk])
    for runs in (2, 3):  # the repetition happens once only
        assert_same(head(x, [1, 3]), expected)
        assert model.runs == runs


def test_a_forward_under_no_grad():
    net, x = Net().eval(), images()
    model = Passes(torch.no_grad()(lambda self, x: self.net(x)), net=net)
    assert_same(HeadCapture(model, [net.trunk])(x, [1, 3]), full_backward(net, [net.trunk], x, total((1, 3))))


def checkpointed(part, reentrant):
    """``Net`` with ``part`` under activation checkpointing."""

    def forward(self, x):
        for name in ("trunk", "head", "fc"):
            module = getattr(self.net, name)
            x = checkpoint(module, x, use_reentrant=reentrant) if name == part else module(x)
        return x

    return Passes(forward, net=Net(inplace=False).eval())


@pytest.mark.parametrize("layers", [["trunk"], ["head.1"], ["trunk.0", "head.1"], ["trunk.2", "head.0"]])
@pytest.mark.parametrize("part", ["trunk", "head"])
def test_checkpointing(part, layers):
    model, x = checkpointed(part, reentrant=False), images()
    expected = full_backward(model.net, [model.net.get_submodule(name) for name in layers], x, total((1, 3)))
    head = HeadCapture(model, [model.net.get_submodule(name) for name in layers])
    for runs in (1, 2):
        assert_same(head(x, [1, 3]), expected)
        assert model.runs == runs


def test_recomputation_in_the_backward_still_meets_the_hooks():
    def forward(self, x):
        x = self.stem(x)
        left, right = self.left(x), checkpoint(self.right, x, use_reentrant=False)
        return self.fc((left * right).mean((2, 3)))

    right = nn.Sequential(conv(6), nn.Sigmoid())  # frozen, so that only the hook starts a graph in it
    model = Passes(forward, stem=conv(), left=conv(6), right=right, fc=nn.Linear(6, 4)).requires_grad_(False)
    check(model, [model.left, right[0]], images(), passes=2)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing():
    x = images()
    model = checkpointed("trunk", reentrant=True)
    layer = model.net.head[1]
    assert_same(HeadCapture(model, [layer])(x, [1, 3]), full_backward(model.net, [layer], x, total((1, 3))))
    with untouched(model), pytest.raises(ValueError, match="'net.trunk.0'.*reentrant checkpointing"):
        HeadCapture(model, [model.net.trunk[0]])(x)
    model = checkpointed("head", reentrant=True)
    with untouched(model), pytest.raises(RuntimeError, match="use_reentrant"):
        HeadCapture(model, [model.net.trunk])(x)


# Compiled, wrapped and rewritten models


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run_compiled(model, x):
    """Fill the caches of compiled code, for both modes."""
    model(x)
    with torch.no_grad():
        model(x)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_model_that_already_ran():
    net, x = Net().eval(), images()
    expected = full_backward(net, [net.trunk[2]], x, total((1, 3)))
    model = torch.compile(net, backend="eager")
    run_compiled(model, x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with untouched(net):
        assert_same(HeadCapture(model, [model.trunk[2]])(x, [1, 3]), expected)
        assert_same(HeadCapture(model, [net.trunk[2]])(x, [1, 3]), expected)
        assert_same(HeadCapture(net, [model.trunk[2]])(x, [1, 3]), expected)
    run_compiled(model, x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0  # the caller's code is still good


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_submodule_and_module_compile():
    model, x = Net().eval(), images()
    layer = model.trunk[2]
    expected = full_backward(model, [layer], x, total((1, 3)))
    heads = [HeadCapture(model, [layer])]
    trunk, model.trunk = model.trunk, torch.compile(model.trunk, backend="eager")
    run_compiled(model, x)
    wrapped_again = torch.compile(trunk, backend="eager")
    heads += [HeadCapture(model, [target]) for target in (layer, model.trunk, trunk, wrapped_again)]
    for head in heads:
        assert_same(head(x, [1, 3]), expected)
    assert find_module_name(model, layer) == "trunk.2" and find_module_name(model, model.trunk) == "trunk"

    model.trunk = trunk
    model.compile(backend="eager")
    layer.compile(backend="eager")
    run_compiled(model, x)
    assert_same(heads[0](x, [1, 3]), expected)
    assert_same(HeadCapture(model, [layer])(x, [1, 3]), expected)


def test_data_parallel_and_fx():
    net, x = Net().eval(), images()
    expected = full_backward(net, [net.trunk], x, total((1, 3)))
    model = nn.DataParallel(net)
    assert_same(HeadCapture(model, [model.module.trunk])(x, [1, 3]), expected)
    traced = torch.fx.symbolic_trace(net)
    layer = traced.get_submodule("trunk.2")
    assert_same(HeadCapture(traced, [layer])(x, [1, 3]), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_scripted_and_traced_models_are_refused():
    net, x = Net().eval(), images()
    for model in (torch.jit.script(net), torch.jit.trace(net, x)):
        with pytest.raises(TypeError, match="eager modules, got scripted or traced"):
            HeadCapture(model, [net.trunk])
    model = nn.Sequential(torch.jit.script(net.trunk), net.head)
    with pytest.raises(TypeError, match="eager modules, got scripted or traced"):
        HeadCapture(model, [model[0]])


# Nothing stays


def raising(*_):
    raise KeyError("raised on purpose")


def raise_in_backward(module, inputs, output):
    output.register_hook(raising)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_state_after_a_call(grad, frozen):
    model, x = Net().eval().requires_grad_(not frozen), images().requires_grad_()
    model.fc.train()
    if not frozen:
        model(x).sum().backward()  # so that there are .grad to disturb
    user = model.trunk.register_forward_hook(lambda *_: None)
    layers = [model.trunk, model.head[1]]
    with torch.set_grad_enabled(grad), untouched(model, x), HeadCapture(model, layers) as head:
        head(x)
        head(x, [1, 2])
        head.release()
        head.release()
    assert user.id in model.trunk._forward_hooks


def test_hooks_are_on_the_model_during_a_call_only():
    model = Net().eval()
    seen = []
    model.fc.register_forward_pre_hook(lambda *_: seen.append(len(model.trunk._forward_hooks)))
    HeadCapture(model, [model.trunk])(images())
    assert seen == [1] and not model.trunk._forward_hooks


FAILURES = {
    "model, before the layer": (KeyError, lambda m: m.trunk[1].register_forward_hook(raising), None),
    "model, after the layer": (KeyError, lambda m: m.head[2].register_forward_hook(raising), None),
    "first target": (KeyError, None, [raising, raising]),
    "second target": (KeyError, None, [torch.sum, raising]),
    "wrong count": (ValueError, None, [1]),
    "class out of range": (ValueError, None, [1, 99]),
    "no gradient": (ValueError, None, [lambda output: output.detach().sum()] * 2),
    "backward": (KeyError, lambda m: m.head[3].register_forward_hook(raise_in_backward), None),
    "reshape_transform": (KeyError, None, None),
}


@pytest.mark.parametrize("stage", FAILURES)
@pytest.mark.parametrize("grad", [False, True])
def test_state_after_a_call_that_raised(stage, grad):
    error, prepare, targets = FAILURES[stage]
    model, x = Net().eval(), images().requires_grad_()
    model(x).sum().backward()
    handle = prepare(model) if prepare else contextlib.nullcontext()
    head = HeadCapture(model, [model.trunk, model.head[1]], raising if stage == "reshape_transform" else None)
    with torch.set_grad_enabled(grad), untouched(model, x), pytest.raises(error):
        head(x, targets)
    with handle:
        pass  # leaving a hook's handle removes it
    head.reshape_transform = None
    assert_same(head(x, [1, 3]), full_backward(model, head.target_layers, x, total((1, 3))))


# What the head-only backward saves


def saved_bytes(function):
    """Bytes that autograd keeps for the backward while ``function`` runs, each storage counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    parameters = {parameter.data_ptr() for parameter in result[1].parameters()}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_the_trunk_stores_nothing():
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model, x = models.resnet18().eval(), images(2, (96, 96))
    everything = saved_bytes(lambda: (model(x), model))
    head = saved_bytes(lambda: (HeadCapture(model, [model.layer4[-1]])(x), model))
    block = saved_bytes(lambda: (HeadCapture(model, [model.layer3[-1]])(x), model))
    assert 0 < head < block < everything / 5 and head < everything / 100


# No host wait


class Recorded(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


LOOKS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "index"}


@pytest.mark.parametrize("targets", [None, [lambda output: output[1]] * 2])
def test_no_operation_looks_at_a_value(targets):
    model, x = Net().eval(), images()
    with Recorded() as recorded:
        HeadCapture(model, [model.trunk])(x, targets)
    assert "convolution_backward" in recorded.names and not LOOKS & set(recorded.names)
    with Recorded() as recorded:
        HeadCapture(model, [model.trunk])(x, torch.tensor([1, 3]))  # on the CPU the range is checked, so it must show
    assert LOOKS & set(recorded.names)


@pytest.mark.parametrize(
    "targets",
    [None, [1, 3], torch.tensor([1, 3]), torch.tensor([1, 99], device="meta"), [lambda output: output[1]] * 2],
)
def test_nothing_needs_the_values_of_an_accelerators_tensors(targets):
    """On the meta device every look at a value raises, as every wait for it would."""
    model = Net().eval().to("meta")
    capture = HeadCapture(model, [model.trunk])(images().to("meta"), targets)
    assert capture.gradients[0].shape == (2, 6, 6, 5)
    with pytest.raises((RuntimeError, NotImplementedError)):
        capture.outputs[0, 0].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("targets", [None, [1, 3], torch.tensor([1, 3]), [lambda output: output[1]] * 2])
def test_cuda_input_is_moved_and_no_call_waits_for_the_device(targets):
    model, x = Net().eval().cuda(), images()
    head = HeadCapture(model, [model.trunk])
    moved = head(x, targets)
    x = x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        capture = head(x, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert capture.gradients[0].is_cuda
    torch.testing.assert_close(capture.gradients, moved.gradients)


# Outputs of other structures


def structured(wrap):
    net = Net().eval()
    return Passes(lambda self, x: wrap(self.net(x)), net=net)


Output = collections.namedtuple("Output", "logits loss")


@pytest.mark.parametrize(
    "wrap, target",
    [
        (lambda t: {"logits": t, "loss": t.sum(), "n": 3}, lambda output: output["logits"][1]),
        (lambda t: (t, t.new_zeros(7)), lambda output: output[0][1] + output[1].sum()),
        (lambda t: Output(t, None), lambda output: output.logits[1]),
        (lambda t: {"deep": [{"logits": t}, "text"]}, lambda output: output["deep"][0]["logits"][1]),
        (lambda t: [{"scores": row[1:2]} for row in t], lambda output: output["scores"]),
        (lambda t: [t, t, t], lambda output: output[2][1]),
        (lambda t: t[:, 1], lambda output: output),
        (lambda t: t[:, :, None, None].expand(-1, -1, 2, 2), lambda output: output[1, 0, 1]),
    ],
    ids=["dict", "tuple", "namedtuple", "nested", "list per image", "list", "vector", "segmentation"],
)
def test_outputs_of_other_structures_with_callables(wrap, target):
    model, x = structured(wrap), images()
    expected = full_backward(model.net, [model.net.trunk], x, total((1, 1)))
    capture = HeadCapture(model, [model.net.trunk])(x, [target, target])
    raw = model(x)
    assert type(capture.outputs) is type(raw)
    leaves, expected_leaves = (torch.utils._pytree.tree_leaves(outputs) for outputs in (capture.outputs, raw))
    for ours, theirs in zip(leaves, expected_leaves, strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs) and not ours.requires_grad
        else:
            assert ours == theirs
    assert torch.equal(capture.gradients[0], expected[2][0])


@pytest.mark.parametrize(
    "kind", ["ClassifierOutputTarget", "ClassifierOutputSoftmaxTarget", "BinaryClassifierOutputTarget"]
)
def test_pytorch_grad_cam_targets(kind):
    library = pytest.importorskip("pytorch_grad_cam.utils.model_targets", reason="grad-cam is not installed")
    target, binary = getattr(library, kind), kind.startswith("Binary")
    model, x = Net(n_classes=1 if binary else 4).eval(), images()
    targets = [target(0 if binary else 3), target(1)]

    def score(outputs):
        return sum(target(output).sum() for target, output in zip(targets, outputs))

    expected = full_backward(model, [model.trunk], x, score)
    assert_same(HeadCapture(model, [model.trunk])(x, targets), expected)


def test_some_images_may_have_constant_scores():
    model, x = Net().eval(), images()
    capture = HeadCapture(model, [model.trunk])(x, [lambda output: output[0], lambda output: torch.zeros(1)])
    assert capture.gradients[0][0].count_nonzero() and not capture.gradients[0][1].any()


# Errors


def test_find_module_name():
    model = Net()
    assert find_module_name(model, model.head[1]) == "head.1"
    assert find_module_name(nn.DataParallel(model), model) == "Net"
    with pytest.raises(ValueError, match="one of the modules of Net, got a ReLU that is not"):
        find_module_name(model, nn.ReLU())


@pytest.mark.parametrize(
    "layers, error, message",
    [
        (lambda m: m.trunk, TypeError, r"target_layers must be a list of modules, got Sequential; .*\[layer\]"),
        (lambda m: "trunk", TypeError, "target_layers must be a list of modules, got str"),
        (lambda m: [], ValueError, "at least one layer, got an empty list"),
        (lambda m: [m.trunk, "head"], TypeError, r"target_layers\[1\] must be a torch.nn.Module, got str"),
        (lambda m: [m.trunk, nn.Conv2d(3, 6, 3)], ValueError, "modules of Net, got a Conv2d that is not"),
    ],
)
def test_bad_layers(layers, error, message):
    model = Net()
    with pytest.raises(error, match=message):
        HeadCapture(model, layers(model))


def test_bad_model_and_transform():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        HeadCapture(images, [nn.ReLU()])
    model = Net()
    with pytest.raises(TypeError, match="reshape_transform must be None or callable, got int"):
        HeadCapture(model, [model.trunk], 3)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (np.zeros((2, 3, 8, 8)), TypeError, "input_tensor must be a torch.Tensor, or a tuple or dict .*, got ndarray"),
        (
            torch.zeros(2, 3, 8, 8).byte(),
            TypeError,
            "what the model takes, and it failed on torch.uint8; .* divide by 255",
        ),
        (torch.zeros(0, 3, 8, 8), ValueError, r"B >= 1, got \(0, 3, 8, 8\)"),
        (torch.tensor(1.0), ValueError, r"B >= 1, got \(\)"),
    ],
)
def test_bad_inputs(x, error, message):
    model = Net().eval()
    with pytest.raises(error, match=message):
        HeadCapture(model, [model.trunk])(x)


@pytest.mark.parametrize(
    "targets, error, message",
    [
        ([1], ValueError, "one target per image: expected 2, got 1"),
        ([1, 2, 3], ValueError, "one target per image: expected 2, got 3"),
        ([], ValueError, "one target per image: expected 2, got 0"),
        ([torch.sum], ValueError, "one target per image: expected 2, got 1"),
        ([1, 4], ValueError, r"class indices in \[0, 4\), got 4"),
        ([-1, 0], ValueError, r"class indices in \[0, 4\), got -1"),
        (torch.tensor([0, 7]), ValueError, r"class indices in \[0, 4\), got 7"),
        (torch.tensor([0, 1, 2]), ValueError, r"targets must have shape \(2,\), got \(3,\)"),
        (torch.tensor([[0], [1]]), ValueError, r"targets must have shape \(2,\), got \(2, 1\)"),
        (torch.tensor(1), ValueError, r"targets must have shape \(2,\), got \(\)"),
        (torch.tensor([0.0, 1.0]), TypeError, "targets must be an integer tensor, got torch.float32"),
        (torch.tensor([True, False]), TypeError, "targets must be an integer tensor, got torch.bool"),
        (1, TypeError, r"got int; for one image write \[target\]"),
        (torch.sum, TypeError, r"got builtin_function_or_method; for one image write \[target\]"),
        ({1, 2}, TypeError, "targets must be None, a list .*, got set$"),
        ([True, False], TypeError, r"all class indices or all callables, got bool at \[0\]"),
        ([0, 1.0], TypeError, r"all class indices or all callables, got float at \[1\]"),
        (np.array([0.0, 1.0]), TypeError, r"got float64 at \[0\]"),
        (np.array([True, False]), TypeError, r"got bool_? at \[0\]"),
        ([0, torch.sum], TypeError, r"all class indices or all callables, got builtin_function_or_method at \[1\]"),
        ([lambda o: o[0], lambda o: o], ValueError, r"\[1\] must return a one-element tensor, got shape \(4,\)"),
        ([lambda o: o[0], lambda o: 1.0], TypeError, r"targets\[1\] must return a one-element tensor, got float"),
        ([lambda o: o.argmax()] * 2, ValueError, "the score must be differentiable"),
    ],
)
def test_bad_targets(targets, error, message):
    model = Net().eval()
    with untouched(model), pytest.raises(error, match=message):
        HeadCapture(model, [model.trunk])(images(), targets)


@pytest.mark.parametrize(
    "wrap, error, message",
    [
        (
            lambda t: {"out": t[:, :, None, None]},
            ValueError,
            r"returns dict: .*, got out: \(2, 4, 1, 1\) torch.float32$",
        ),
        (lambda t: {"logits": t[:1]}, ValueError, r"need \(2, n_classes\), called logits .* got logits: \(1, 4\)"),
        (lambda t: [t, t + 1], ValueError, r"returns list: .*, got \[0\]: \(2, 4\) torch.float32, \[1\]: \(2, 4\)"),
        (lambda t: "text", TypeError, r"returns str: class indices and None need \(2, n_classes\)$"),
        (lambda t: t[:, :, None], ValueError, r"returns shape \(2, 4, 1\): .* need \(2, n_classes\)"),
        (lambda t: t.flatten()[:, None], ValueError, r"returns shape \(8, 1\)"),
        (lambda t: t.detach(), ValueError, "the score must be differentiable"),
        (lambda t: t.long(), ValueError, "the score must be differentiable"),
    ],
)
@pytest.mark.parametrize("targets", [None, [1, 1]])
def test_outputs_that_class_indices_do_not_fit(wrap, error, message, targets):
    model = structured(wrap)
    if "8, 1" in message and targets is None:
        targets = torch.tensor([0, 0])
    with untouched(model), pytest.raises(error, match=message):
        HeadCapture(model, [model.net.trunk])(images(), targets)


def test_layers_that_do_not_run_or_do_not_matter():
    def forward(self, x):
        self.side(x)
        return self.net(x)

    model = Passes(forward, net=Net().eval(), aux=nn.ReLU(), side=conv())
    with untouched(model), pytest.raises(ValueError, match="target layer 'aux' did not run in the forward pass"):
        HeadCapture(model, [model.net.trunk, model.aux])(images())
    with untouched(model), pytest.raises(ValueError, match="score does not depend on target layer 'side'"):
        HeadCapture(model, [model.net.trunk, model.side])(images())


@pytest.mark.parametrize(
    "output, error, message",
    [
        (lambda x: {"features": x}, TypeError, "'layer' must return a floating-point tensor, or a .* one, got dict"),
        (lambda x: (None, x), TypeError, "got a tuple that starts with NoneType"),
        (lambda x: ((x, x), x), TypeError, "got a tuple that starts with a tuple that starts with a tensor"),
        (lambda x: (), TypeError, "got tuple$"),
        (lambda x: x > 0, TypeError, "got a tensor of torch.bool"),
        (lambda x: x.flatten(1), ValueError, r"'layer' must return \(B, C, h, w\), got \(2, 168\); .*reshape_tr"),
        (lambda x: x[0], ValueError, r"'layer' must return \(B, C, h, w\), got \(3, 8, 7\)"),
        (lambda x: x[:, :, :0], ValueError, r"'layer' must return a grid with at least one cell, got \(2, 3, 0, 7\)"),
        (lambda x: torch.cat([x, x]), ValueError, r"one row per image, \(2, C, h, w\), got \(4, 3, 8, 7\)"),
    ],
)
def test_bad_layer_outputs(output, error, message):
    model = Passes(lambda self, x: (self.layer(x), x.mean((2, 3)))[1], layer=Passes(lambda self, x: output(x)))
    with untouched(model), pytest.raises(error, match=message):
        HeadCapture(model, [model.layer])(images())


def test_a_grid_of_one_row_is_a_grid():
    layer = nn.Conv2d(3, 6, (8, 1))
    model = Passes(lambda self, x: self.fc(self.layer(x).mean((2, 3))), layer=layer, fc=nn.Linear(6, 4))
    check(model, [layer], images())


def test_a_reshape_transform_with_parameters_of_its_own():
    model, x, transform = Net().eval(), images(), nn.Conv2d(6, 2, 1)
    capture = HeadCapture(model, [model.trunk], transform)(x, [1, 3])
    plain = HeadCapture(model, [model.trunk])(x, [1, 3])
    for ours, theirs in zip(capture.activations + capture.gradients, plain.activations + plain.gradients):
        assert torch.equal(ours, transform(theirs)) and not ours.requires_grad


@pytest.mark.parametrize(
    "transform, error, message",
    [
        (lambda t: t.flatten(1), ValueError, r"of target layer 'trunk' must return \(B, C, h, w\), got \(2, 180\)$"),
        (lambda t: t.numpy(), TypeError, "reshape_transform of .* 'trunk' must return a tensor, got ndarray"),
        (lambda t: t[:1], ValueError, r"one row per image, \(2, C, h, w\), got \(1, 6, 6, 5\)$"),
    ],
)
def test_bad_reshape_transforms(transform, error, message):
    model = Net().eval()
    with untouched(model), pytest.raises(error, match=message):
        HeadCapture(model, [model.trunk], transform)(images())


@pytest.mark.parametrize("layer", [nn.Identity(), nn.Dropout(0.5), nn.Sequential(nn.Identity())])
def test_a_layer_that_hands_its_input_on(layer):
    """What the model made of that tensor before the layer is in its gradient, as where hooks see the tensor itself."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.branch, self.layer = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), layer

        def forward(self, images):
            x = self.first(images)
            before = self.branch(x)
            return (self.layer(x).sin() + before + x).exp().mean((2, 3))

    model, images = Residual().eval(), torch.rand(2, 3, 6, 6)
    kept = []
    handle = model.first.register_forward_hook(lambda module, args, output: kept.append(output))
    scores = model(images)
    handle.remove()
    (expected,) = torch.autograd.grad(scores[0, 1] + scores[1, 2], kept[0])
    capture = HeadCapture(model, [layer])
    for _ in range(2):
        captured = capture(images, [1, 2])
        torch.testing.assert_close(captured.gradients[0], expected)
        assert torch.equal(captured.activations[0], kept[0])
