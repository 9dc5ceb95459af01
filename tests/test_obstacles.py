"""Models that cannot be explained as they are: the error names the cause and the remedy."""

import warnings

import pytest
import torch
from torch import nn

from cfcam_gpu import CFCAM
from cfcam_gpu.capture import HeadCapture

pytestmark = pytest.mark.usefixtures("seed", "one_thread")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.mix, self.rnn, self.fc = layer, nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        tokens = self.body(x).flatten(2).transpose(1, 2)
        return self.fc(self.rnn(self.mix(tokens))[0].mean(1))


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def images():
    return torch.randn(2, 3, 9, 8)


# Weights made under inference_mode


@pytest.mark.parametrize("layer", ["body", "body.0", "mix.norm1"])
@pytest.mark.parametrize("inside", [False, True])
def test_weights_made_in_inference_mode(layer, inside):
    model, x = Net().double().eval(), images().double()
    with torch.inference_mode():
        made = Net().double().eval()
        made.load_state_dict(model.state_dict())
    assert next(made.parameters()).is_inference()

    def to_map(tokens):
        return tokens.transpose(1, 2).unflatten(2, (7, 6))

    transform = to_map if layer.startswith("mix") else None
    expected = HeadCapture(model, [model.get_submodule(layer)], transform)(x, [1, 3])
    objects = [(name, id(parameter)) for name, parameter in made.named_parameters()]
    head = HeadCapture(made, [made.get_submodule(layer)], transform)
    for _ in range(2):
        with torch.inference_mode(inside):
            capture = head(x, [1, 3])
        # By their places in memory tensors are summed in another order.
        torch.testing.assert_close(capture.activations[0], expected.activations[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(capture.gradients[0], expected.gradients[0], rtol=0, atol=1e-13)
        assert capture.gradients[0].count_nonzero()
    assert objects == [(name, id(parameter)) for name, parameter in made.named_parameters()]
    assert all(parameter.is_inference() and parameter.grad is None for parameter in made.parameters())


def test_an_error_of_such_a_model_is_its_own():
    with torch.inference_mode():
        model = convolutional()
    with pytest.raises(RuntimeError, match="mat1 and mat2|shape|size"):
        HeadCapture(nn.Sequential(model, nn.Linear(9, 2)), [model[0]])(images())
    assert not model[0]._forward_hooks


# Graphs


def test_modules_of_fx_name_a_layer_that_runs():
    model, x = (
        nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), nn.Flatten(), nn.Linear(252, 4)).eval(),
        images(),
    )
    graph = torch.fx.symbolic_trace(model)
    with pytest.raises(ValueError, match=r"target layer '0' did not run .* is a GraphModule, .* such as '0.1'$"):
        CFCAM(graph, [graph.get_submodule("0")]).maps(x)
    maps = CFCAM(graph, [graph.get_submodule("0.1")]).maps(x, [1, 2])
    assert torch.equal(maps, CFCAM(model, [model[0][1]]).maps(x, [1, 2]))


def test_exported_modules_name_the_remedy():
    model = convolutional()
    exported = torch.export.export(model, (images(),)).module()
    name, layer = next((name, module) for name, module in exported.named_modules() if name == "0")
    with pytest.raises(ValueError, match="GraphModule, of torch.export .*: take the module that it was made from$"):
        CFCAM(exported, [layer]).maps(images())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_name_the_remedy():
    model = torch.jit.trace(convolutional(), images())
    with pytest.raises(TypeError, match="scripted or traced, which run no hooks; take the module that they were made"):
        CFCAM(model, [getattr(model, "0")])


# Quantised layers


def quantised(model):
    if not torch.backends.quantized.supported_engines or torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no engine for quantised layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def test_a_quantised_head():
    model = quantised(convolutional())
    with pytest.raises(ValueError, match="layer '4' is quantised and has no gradient: explain the float model$"):
        CFCAM(model, [model[0]]).maps(images())
    assert not model[0]._forward_hooks


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_target_layer():
    class Quantise(nn.Module):
        def forward(self, x):
            return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)

    layer = Quantise()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer)
    with pytest.raises(
        TypeError, match="got a tensor of torch.quint8; the layer is quantised .*: explain the float model"
    ):
        CFCAM(model, [layer]).maps(images())


# Weights that are elsewhere


@pytest.mark.parametrize("where", [0, 4])
def test_weights_on_the_meta_device(where):
    model = convolutional()
    model[where].to("meta")
    with pytest.raises(ValueError, match=r"got '\w+.weight' on the meta device, without values: load them first"):
        CFCAM(model, [model[1]]).maps(images(), [1, 2])
    assert not model[1]._forward_hooks


def test_a_whole_model_on_the_meta_device():
    with torch.device("meta"):
        model = convolutional()
    cam = CFCAM(model, [model[1]])
    with pytest.raises(ValueError, match="'Conv2d.weight' on the meta device"):
        cam.maps(images(), [1, 2])
    model.to_empty(device="cpu").load_state_dict(convolutional().state_dict())
    assert cam.maps(images(), [1, 2]).isfinite().all()


def test_weights_that_are_loaded_for_the_layers_run():
    model, x = convolutional(), images()
    expected = CFCAM(model, [model[1]]).maps(x, [1, 2])
    weight, head = model[4].weight, model[4]

    def load(layer, inputs):
        head.weight = weight

    def unload(layer, inputs, output):
        head.weight = nn.Parameter(weight.to("meta"))

    head._hf_hook = "as offloading libraries mark it"
    head.register_forward_pre_hook(load)
    head.register_forward_hook(unload)
    unload(head, None, None)
    assert torch.equal(CFCAM(model, [model[1]]).maps(x, [1, 2]), expected)


def test_operations_on_such_weights_outside_their_layer():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.held = convolutional(), nn.Linear(4, 4, device="meta")

        def forward(self, x):
            return nn.functional.linear(self.net(x), self.held.weight, self.held.bias)

    model = Outside()
    with pytest.raises(ValueError, match="'held.weight' on the meta device, without values"):
        CFCAM(model, [model.net[1]]).maps(images())


class DTensor(torch.Tensor):
    """By its name a sharded tensor."""


def test_sharded_activations_and_weights():
    shard = lambda layer, inputs, output: output.as_subclass(DTensor)
    model = convolutional()
    model[1].register_forward_hook(shard)
    with pytest.raises(TypeError, match="'1' must return a plain tensor, got a DTensor, which is sharded"):
        CFCAM(model, [model[1]]).maps(images(), [1, 2])

    def refuse(layer, inputs):
        raise RuntimeError("got mixed torch.Tensor and DTensor")

    model = convolutional()
    model[4].weight = nn.Parameter(model[4].weight.detach().as_subclass(DTensor))
    model[4].register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=r"plain tensors, got '4.weight' .* sharded \(DTensor\).*full_tensor\(\)"):
        CFCAM(model, [model[1]]).maps(images(), [1, 2])


def test_other_errors_are_the_models_own():
    model = convolutional()

    def fail(layer, inputs):
        raise RuntimeError("of its own")

    model[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="^of its own$"):
        CFCAM(model, [model[1]]).maps(images())
