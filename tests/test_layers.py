"""The layer to explain a model at: the default of ten networks, layers by name, and what cannot be explained."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from cfcam_gpu import CFCAM, dry_run, layers, models
from cfcam_gpu.dry_run import KEPT_BYTES, DryRun

tokens_of_cells = dry_run._tokens_of_cells

pytestmark = pytest.mark.usefixtures("one_thread")


class Spy(nn.Module):
    """A small network with what the search has to cope with: reuse, in-place changes, tuples and a dead end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16))
        self.dead_end = nn.Conv2d(16, 16, 1)
        self.identity = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(64, 10)

    def forward(self, images):
        images.sub_(0.5)
        features = self.act(self.body(self.act(self.first(images))))
        self.dead_end(features)
        return self.fc(self.pool(self.identity(features)).flatten(1))


@pytest.mark.parametrize(
    "spec, name, shape",
    [
        ("demo", "_swish", (1280, 7, 7)),  # runs twice, and everything after it is a summary
        ("torchvision:resnet18:random", "layer4", (512, 7, 7)),  # four names for one tensor
        ("torchvision:densenet121:random", "features", (1024, 7, 7)),  # an in-place ReLU after it
        ("torchvision:vgg11:random", "features", (512, 7, 7)),  # an adaptive pooling that keeps the grid after it
        ("torchvision:mobilenet_v3_small:random", "features", (576, 7, 7)),
        ("torchvision:squeezenet1_1:random", "features", (512, 13, 13)),  # class scores as a map after it
        ("torchvision:swin_t:random", "permute", (768, 7, 7)),
        ("timm:vit_tiny_patch16_224:random", "blocks.11.norm1", (192, 14, 14)),
        ("timm:deit_tiny_distilled_patch16_224:random", "blocks.11.norm1", (192, 14, 14)),  # two prefix tokens
        ("timm:swin_tiny_patch4_window7_224:random", "norm", (768, 7, 7)),  # channels last
    ],
)
def test_default_target_layer(seed, spec, name, shape):
    pytest.importorskip({"demo": "efficientnet_lite_pytorch"}.get(spec, spec.partition(":")[0]))
    loaded = models.load_model(spec)
    example = torch.rand(1, 3, 224, 224)
    target = layers.inspect_target_layer(loaded.model, example)
    assert (target.name, target.shape, target.n_classes) == (name, shape, 1000)
    assert target.module is layers.get_layer(loaded.model, name)

    kept = []
    handle = target.module.register_forward_hook(lambda *args: kept.append(args[2].detach()))
    with torch.no_grad():
        loaded.model(example)
    handle.remove()
    mapped = target.reshape_transform(kept[-1]) if target.reshape_transform else kept[-1]
    assert mapped.shape == (1, *shape)
    if kept[-1].ndim == 3:  # the last token is the grid's last cell
        assert torch.equal(mapped[0, :, -1, -1], kept[-1][0, -1])


def test_the_search_leaves_the_model_and_the_input_as_they_were(seed):
    model, example = Spy().train(), torch.rand(2, 3, 32, 32)
    model.body.eval()
    model.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, kept = [module.training for module in model.modules()], example.clone()
    with torch.inference_mode():
        name, layer, reshape = layers.find_target_layer(model, example)
    assert (name, layer, reshape) == ("act", model.act, None)
    with pytest.raises(ValueError):
        layers.inspect_target_layer(model, example, "dead_end")
    with pytest.raises(RuntimeError):
        layers.find_target_layer(model, torch.rand(1, 4, 32, 32))
    assert torch.equal(example, kept)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


class NoScores(nn.Module):
    def forward(self, images):
        return {"first": images.mean((2, 3)), "second": images.amax((2, 3))}


@pytest.mark.parametrize(
    "model, name, message",
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), None, "no layer of Sequential keeps a map of the image"),
        (NoScores(), None, r"first.*\(1, 3\).*second"),
        (nn.Conv2d(3, 4, 3), None, r"\(1, 4, 30, 30\)"),
        (Spy(), "body.2", "Spy has no layer 'body.2'; did you mean body"),
        (Spy(), "layer4", "Spy has no layer 'layer4'; it begins with first, act, body"),
        (Spy(), "dead_end", "the top score's gradient is zero at layer dead_end; choose an earlier one"),
        (Spy(), "fc", r"layer fc has no map of the image: .* got \(1, 10\)"),
    ],
)
def test_layers_that_cannot_be_explained(model, name, message):
    with pytest.raises(ValueError, match=message):
        layers.inspect_target_layer(model, torch.rand(1, 3, 32, 32), name)


def test_a_last_layer_of_zeros_is_named_as_the_cause():
    model = Spy()
    nn.init.zeros_(model.fc.weight)
    with pytest.raises(ValueError, match=r"gradient is zero at all \d+ layers of Spy .* a last layer of zeros"):
        layers.find_target_layer(model, torch.rand(1, 3, 32, 32))


def test_a_layer_that_did_not_run():
    model = Spy()
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="layer spare did not run"):
        layers.inspect_target_layer(model, torch.rand(1, 3, 32, 32), "spare")


def test_a_token_layer_by_name_gets_its_reshape():
    pytest.importorskip("timm")
    loaded = models.load_model("timm:vit_tiny_patch16_224:random")
    target = layers.inspect_target_layer(loaded.model, torch.rand(1, 3, 224, 224), "blocks.5")
    assert target.shape == (192, 14, 14) and repr(target.reshape_transform) == "TokensToMap(n_prefix=1, grid=(14, 14))"
    with pytest.raises(ValueError, match="gradient is zero at layer blocks.11; choose an earlier one"):
        layers.inspect_target_layer(loaded.model, torch.rand(1, 3, 224, 224), "blocks.11")


class Tokens(nn.Module):
    """A transformer in small: tokens of patches of 8 pixels, with others before and behind them, in whatever order."""

    def __init__(self, n_prefix, n_suffix=0, shuffled=False, sequence_first=False):
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16), nn.Linear(16, 5)
        self.prefix = nn.Parameter(torch.randn(1, n_prefix, 16))
        self.suffix = nn.Parameter(torch.randn(1, n_suffix, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=not sequence_first)
        self.shuffled, self.sequence_first = shuffled, sequence_first

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        if self.shuffled:
            x = x.flip(1).roll(3, 1)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x, self.suffix.expand(len(x), -1, -1)], 1)
        x = self.norm(x.transpose(0, 1) if self.sequence_first else x)
        x = x + self.attention(x, x, x)[0]
        return self.head(x.mean(0 if self.sequence_first else 1))


def cells_that_change(model, target, images):
    """A cell whose patch is changed in the images, and how much each cell of the layer's map then changes."""

    def mapped(images):
        kept = []
        handle = target.module.register_forward_hook(lambda *args: kept.append(args[2]))
        with torch.no_grad():
            model(images)
        handle.remove()
        output = kept[-1][0] if isinstance(kept[-1], tuple) else kept[-1]
        return target.reshape_transform(output) if target.reshape_transform else output

    sides = [side // cells for side, cells in zip(images.shape[2:], target.shape[1:])]
    cell = [int(torch.randint(cells, ())) for cells in target.shape[1:]]
    (top, left), changed = [at * side for at, side in zip(cell, sides)], images.clone()
    patch = changed[..., top : top + sides[0], left : left + sides[1]]
    patch += 3 * torch.randn_like(patch)
    difference = (mapped(changed) - mapped(images)).abs().mean((0, 1))
    return cell, difference


@pytest.mark.parametrize("size", [(40, 40), (24, 56), (16, 32)])
@pytest.mark.parametrize(
    "options",
    [
        {"n_prefix": 0},
        {"n_prefix": 5},  # a class token and four registers: 5 x 5 and 30 tokens, 3 x 7 and 26
        {"n_prefix": 1, "n_suffix": 4},
        {"n_prefix": 0, "n_suffix": 3, "shuffled": True},
        {"n_prefix": 2, "sequence_first": True},
    ],
    ids=str,
)
def test_each_cell_has_its_own_patch(seed, options, size):
    model, images = Tokens(**options).eval(), torch.rand(1, 3, *size)
    target = layers.inspect_target_layer(model, images, "norm")
    assert target.shape == (16, size[0] // 8, size[1] // 8) and target.notice is None
    cell, difference = cells_that_change(model, target, images)
    assert difference.nonzero().tolist() == [cell]


class Unrolled(nn.Module):
    """Puts every other token first."""

    def forward(self, x):
        return torch.cat([x[:, ::2], x[:, 1::2]], 1)


@pytest.mark.parametrize("how", ["module", "function"])
def test_tokens_that_are_put_elsewhere_later_are_followed(seed, how):
    class Moved(Tokens):
        def __init__(self):
            super().__init__(1)
            self.unroll, self.drop, self.last = Unrolled(), nn.Dropout(), nn.LayerNorm(16)

        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            x = self.drop(torch.cat([self.prefix.expand(len(x), -1, -1), x], 1))  # as many as at the end, in rows
            x = self.unroll(x) if how == "module" else x[:, torch.arange(x.shape[1]).flip(0)]
            x = self.last(x + 0.01 * self.attention(self.norm(x), x, x)[0])
            return self.head(x.mean(1))

    model, images = Moved().eval(), torch.rand(1, 3, 24, 40)
    for name in ("norm", "last"):
        target = layers.inspect_target_layer(model, images, name)
        assert target.reshape_transform.order and target.notice is None
        cell, difference = cells_that_change(model, target, images)
        assert divmod(int(difference.argmax()), 5) == tuple(cell)
    assert layers.inspect_target_layer(model, images, "drop").reshape_transform.order is None


def test_tokens_that_are_picked_when_mixed_are_no_map_in_silence(seed):
    class Picked(Tokens):
        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            x = self.norm(x)
            mixed = self.attention(x, x, x)[0]
            return self.head(self.last(mixed[:, torch.arange(x.shape[1]).flip(0)] ** 2).mean(1))

    model, images = Picked(0), torch.rand(1, 3, 24, 40)
    model.last = nn.LayerNorm(16)
    with pytest.warns(UserWarning, match="is a guess"):
        assert layers.inspect_target_layer(model.eval(), images).name == "last"


def test_tokens_of_half_the_sides_are_a_guess_and_of_no_grid_left_out(seed):
    class Merged(Tokens):
        def __init__(self, stride):
            super().__init__(0)
            self.stride, self.last = stride, nn.LayerNorm(16)

        def forward(self, images):
            x = self.norm(self.embed(images).flatten(2).transpose(1, 2))
            height, width = images.shape[2] // 8, images.shape[3] // 8
            x = x + self.attention(x, x, x)[0]
            x = x.unflatten(1, (height, width))[:, :: self.stride, ::2].flatten(1, 2)
            return self.head(self.last(x).mean(1))

    images = torch.rand(1, 3, 24, 56)
    with pytest.warns(UserWarning, match="is a guess"):
        assert layers.inspect_target_layer(Merged(2).eval(), images).shape == (16, 2, 4)
    with pytest.warns(UserWarning, match="1 layers behind it, the last of them last, .* cannot be read"):
        assert layers.inspect_target_layer(Merged(3).eval(), images).shape == (16, 3, 7)


@pytest.mark.parametrize(
    "attention",
    [
        nn.functional.scaled_dot_product_attention,
        lambda q, k, v: nn.functional.dropout((q @ k.mT).softmax(-1), training=False) @ v,
    ],
)
def test_no_gradient_is_asked_back_through_attention(seed, monkeypatch, attention):
    """Of tokens in another number behind it: it mixes them, and the way back costs more than the whole pass."""

    class Halved(Tokens):
        def __init__(self):
            super().__init__(0)
            self.last = nn.LayerNorm(16)

        def forward(self, images):
            x = self.norm(self.embed(images).flatten(2).transpose(1, 2))
            heads = x.unflatten(2, (2, 8)).transpose(1, 2)
            mixed = attention(heads, heads, heads).transpose(1, 2).flatten(2)
            x = (x + mixed).unflatten(1, (4, 6))[:, ::2, ::2].flatten(1, 2)
            return self.head(self.last(x).mean(1))

    asked = []
    monkeypatch.setattr(
        dry_run,
        "_tokens_of_cells",
        lambda tensor, *rest: asked.append(tensor.shape[1]) or tokens_of_cells(tensor, *rest),
    )
    with pytest.warns(UserWarning, match="is a guess"):
        assert layers.inspect_target_layer(Halved().eval(), torch.rand(1, 3, 32, 48)).shape == (16, 2, 3)
    assert set(asked) == {24}


@pytest.mark.parametrize(
    "name, size, options",
    [
        ("vit_tiny_patch16_224", (64, 96), {"img_size": (64, 96), "depth": 2, "reg_tokens": 4}),
        ("deit_tiny_distilled_patch16_224", (48, 96), {"img_size": (48, 96), "depth": 2}),
        ("swin_tiny_patch4_window7_224", (64, 128), {"img_size": (64, 128), "depths": (1, 1, 1, 1)}),
        ("convnext_atto", (64, 96), {}),
        ("mobilevit_xxs", (192, 256), {}),
        ("pvt_v2_b0", (96, 160), {}),
    ],
)
def test_cells_of_other_peoples_networks_lie_where_their_patches_do(seed, name, size, options):
    timm = pytest.importorskip("timm")
    model, images = timm.create_model(name, pretrained=False, **options).eval(), torch.randn(1, 3, *size)
    target = layers.inspect_target_layer(model, images)
    assert target.notice is None and min(target.shape[1:]) > 1
    hits = 0
    for _ in range(5):
        cell, difference = cells_that_change(model, target, images)
        found = divmod(int(difference.argmax()), target.shape[2])
        hits += max(abs(a - b) for a, b in zip(cell, found)) <= (0 if target.reshape_transform else 1)
    assert hits >= 3, "of five; by chance it would be one, or none"


class TwoTowers(nn.Module):
    """Images and texts, the text's tower last, with a grid that fits as well."""

    def __init__(self):
        super().__init__()
        self.vision = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.ReLU())
        self.words, self.text = nn.Embedding(9, 64), nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU())

    def forward(self, images, words):
        seen = self.vision(images).mean((2, 3))
        return seen @ self.text(self.words(words).unflatten(2, (8, 8))).mean((2, 3)).T + seen[:, :1]


def test_two_towers(seed):
    model, inputs = TwoTowers().eval(), (torch.rand(1, 3, 32, 32), torch.randint(9, (5, 4)))
    with torch.no_grad():
        model.words.weight.abs_()
    target = layers.inspect_target_layer(model, inputs)
    assert target.name == "vision" and target.n_classes == 5
    reasons = {layer.name: layer.reason for layer in layers.candidate_layers(model, inputs)}
    assert reasons["text"] == "does not see the image" and reasons["vision.0"] == "earlier than vision"


class LowRank(nn.Module):
    """As LoRA wraps a layer."""

    def __init__(self, base_layer):
        super().__init__()
        out, into = base_layer.weight.shape[:2]
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.Conv2d(into, 2, 3, 2, 1), nn.Conv2d(2, out, 1)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_an_adapter_is_no_layer_of_its_own(seed):
    model = Spy().eval()
    model.body[0] = LowRank(model.body[0])
    model.act = nn.Identity()
    model.identity = nn.Identity()
    target = layers.inspect_target_layer(model, torch.rand(1, 3, 32, 32))
    assert target.name == "body"
    reasons = {layer.name: layer.reason for layer in layers.candidate_layers(model, torch.rand(1, 3, 32, 32))}
    assert reasons["body.0.lora_A"] == reasons["body.0.lora_B"] == "a part of an adapter"


class LowRankLinear(nn.Module):
    """As people write LoRA themselves: two matrices beside the layer."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down, self.up = (
            nn.Parameter(torch.randn(*shape)) for shape in ((linear.in_features, 3), (3, linear.out_features))
        )

    def forward(self, x):
        return self.linear(x) + x @ self.down @ self.up


class LikePeft(nn.Module):
    """As PEFT wraps a linear layer: the pieces are modules in dictionaries."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, base_layer.out_features, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Sequential(nn.Dropout(0.1), nn.Tanh())})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_dropout["default"](self.lora_A["default"](x)))


@pytest.mark.parametrize("wrapper", [LowRankLinear, LikePeft])
def test_an_adapted_transformer_keeps_its_layer(seed, wrapper):
    timm = pytest.importorskip("timm")
    options = {"img_size": (32, 64), "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    model, images = timm.models.VisionTransformer(**options).eval(), torch.rand(1, 3, 32, 64)
    expected = layers.inspect_target_layer(model, images)
    for block in model.blocks:
        for part, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            setattr(part, name, wrapper(getattr(part, name)))
    target = layers.inspect_target_layer(model.requires_grad_(False), images)
    assert (target.name, target.shape) == (expected.name, expected.shape) == ("blocks.1.norm1", (24, 2, 4))
    reasons = {layer.name: layer.reason for layer in layers.candidate_layers(model, images)}
    assert reasons["blocks.1.attn.qkv"] == "adapts a Linear, a type that is passed over"


def test_how_tokens_attend_is_no_map(seed):
    """(B, heads, N, N) and (B, heads, N, d) look like maps of square images."""

    class Attention(Tokens):
        def __init__(self):
            super().__init__(0)
            self.softmax, self.q_norm, self.weights = nn.Softmax(-1), nn.LayerNorm(16), nn.Tanh()

        def forward(self, images):
            x = self.norm(self.embed(images).flatten(2).transpose(1, 2))
            q = self.q_norm(torch.stack([x, -x], 1))  # of two heads
            attention = self.weights(self.softmax(q @ q.transpose(2, 3)))
            return self.head((attention[:, 0] @ x + attention[:, 1] @ x)[:, 0])

    assert layers.find_target_layer(Attention().eval(), torch.rand(1, 3, 32, 32))[0] == "norm"


def test_the_first_of_several_tensors_may_be_older_than_the_layers_end(seed, monkeypatch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.sigmoid = nn.Conv2d(3, 6, 3), nn.Sigmoid()

        def forward(self, images):
            x = self.conv(images).relu()
            return x, self.sigmoid(self.sigmoid(x) * x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.fc = Two(), nn.Linear(6, 4)

        def forward(self, images):
            first, second = self.two(images)
            return self.fc((first * second).mean((2, 3)))

    for name in ("KEPT_BYTES", "KEPT_OF_MAPS"):
        monkeypatch.setattr(f"cfcam_gpu.dry_run.{name}", 0)
    model, images = Model().eval(), torch.rand(1, 3, 12, 12)
    assert layers.inspect_target_layer(model, images, "two").shape == (6, 10, 10)
    assert layers.find_target_layer(model, images)[0] == "two"


class Bytes(nn.Module):
    """Takes integer images, and is frozen: nothing in it has a gradient by itself."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, 2), nn.ReLU())
        self.fc = nn.Linear(8, 4)
        self.requires_grad_(False)

    def forward(self, images):
        return self.fc(self.body(images.float() / 255).mean((2, 3)))


def test_integer_images_and_channels_last(seed):
    model, images = Bytes().eval(), torch.randint(256, (1, 3, 24, 40), dtype=torch.uint8)
    assert layers.inspect_target_layer(model, images)[:1] == ("body",)
    assert CFCAM(model).maps(images).shape == (1, 24, 40)
    images = images.float().to(memory_format=torch.channels_last)
    target = layers.inspect_target_layer(model.to(memory_format=torch.channels_last), images)
    assert (target.name, target.shape, target.reshape_transform) == ("body", (8, 5, 9), None)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_guess_is_said(seed):
    class Mixed(Tokens):
        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            x = self.norm(x + self.attention(x, x, x)[0])  # the first with a token dimension is mixed already
            return self.head(x.mean(1))

    model = Mixed(0).eval()
    model.embed = nn.Sequential(nn.Unfold(8, stride=8), nn.Softmax(2), nn.Unflatten(2, (1, 25)), nn.Conv2d(192, 16, 1))
    with pytest.warns(UserWarning, match="is a guess"):
        target = layers.inspect_target_layer(model, torch.rand(1, 3, 40, 40))
    assert "is a guess" in target.notice and target.shape[1:] == (5, 5)


def storages():
    gc.collect()
    # Of plain tensors: other tests of the process may have left fake and opaque ones, which have no memory to be seen.
    plain = (each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter))
    plain = (each for each in plain if each.device.type == "cpu" and each.layout == torch.strided)
    tensors = [each.untyped_storage() for each in plain]
    return {storage.data_ptr(): storage.nbytes() for storage in tensors}


def test_the_pass_keeps_little(seed):
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(24)])
    model = nn.Sequential(nn.Conv2d(3, 8, 1), model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    before = storages()
    run = DryRun(model, torch.rand(1, 3, 256, 256))
    of_one = 8 * 256 * 256 * 4  # bytes
    kept = sum(n_bytes for storage, n_bytes in storages().items() if storage not in before)
    assert kept < KEPT_BYTES + 6 * of_one < 24 * of_one
    del run
    assert layers.find_target_layer(model, torch.rand(1, 3, 256, 256))[0] == "1"


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4, "init_values": 0.1}], ids=["plain", "registers, scaled"])
def test_one_pass_of_a_transformer_is_enough(seed, monkeypatch, options):
    timm = pytest.importorskip("timm")
    # Beyond what is kept in any case: a block's largest tensor is 4 MiB.
    options = {"img_size": 128, "patch_size": 4, "embed_dim": 256, "num_heads": 4, "num_classes": 3, **options}
    model = timm.models.VisionTransformer(depth=3, **options).eval()
    passes, make = [], DryRun.__init__
    monkeypatch.setattr(DryRun, "__init__", lambda run, *args: passes.append(run) or make(run, *args))
    before = storages()
    assert layers.inspect_target_layer(model, torch.rand(1, 3, 128, 128)).name == "blocks.2.norm1"
    kept = sum(n_bytes for storage, n_bytes in storages().items() if storage not in before)
    assert len(passes) == 1
    assert kept < 3.6 * 4 * 2**20, "of about 17 MiB that a block saves"


def test_the_names_that_models_had_are_still_there():
    for name in ("TargetLayer", "TokensToMap", "channels_last_to_map", "find_target_layer", "get_layer"):
        assert getattr(models, name) is getattr(layers, name)
    assert models.inspect_target_layer is layers.inspect_target_layer


def test_cfcam_finds_its_layer(seed, caplog):
    model, images = Spy().eval(), torch.rand(2, 3, 32, 32)
    cam = CFCAM(model)
    assert cam.target_names is None and cam.guide_names is None
    with caplog.at_level("INFO", "cfcam_gpu"):
        maps = [cam.maps(images, [1, 2]) for _ in range(2)]
    assert cam.target_names == ["act"] and caplog.text.count("target layer of Spy: act") == 1
    expected = CFCAM(model, [model.act]).maps(images, [1, 2])
    assert torch.equal(maps[0], expected) and torch.equal(maps[1], expected)

    model = Tokens(3).eval()
    cam, images = CFCAM(model), torch.rand(2, 3, 24, 40)
    found = layers.inspect_target_layer(model, images[:1])
    expected = CFCAM(model, [found.module], found.reshape_transform).maps(images, top=2)
    assert torch.equal(cam.maps(images, top=2), expected) and cam.target_names == [found.name]
    for arguments, error in (((model, None, lambda x: x), ValueError), ((3,), TypeError)):
        with pytest.raises(error):
            CFCAM(*arguments)
    with pytest.raises(ValueError, match="no layer of Sequential"):
        CFCAM(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))).maps(torch.rand(1, 3, 32, 32))


def test_tokens_of_images_of_another_size_lie_elsewhere(seed):
    """As many tokens, but another grid."""
    model = Tokens(3).eval()
    cam, name = CFCAM(model), layers.find_target_layer(model, torch.rand(1, 3, 24, 40))[0]
    for size in ((24, 40), (40, 24), (16, 48), (24, 40)):
        images = torch.rand(2, 3, *size)
        found = layers.inspect_target_layer(model, images[:1], name)
        assert found.reshape_transform.grid == (size[0] // 8, size[1] // 8)
        expected = CFCAM(model, [found.module], found.reshape_transform).maps(images, top=2)
        assert torch.equal(cam.maps(images, top=2), expected) and cam.target_names == [name]
    with pytest.raises(ValueError, match="takes 18 tokens, got .* images of another size have another grid"):
        found.reshape_transform(torch.rand(1, 20, 16))


def test_threads_that_share_an_object_find_its_layer_once(seed, caplog):
    model, images = Spy().eval(), torch.rand(1, 3, 32, 32)
    cam = CFCAM(model)
    with caplog.at_level("INFO", "cfcam_gpu"), ThreadPoolExecutor(4) as pool:
        maps = list(pool.map(lambda _: cam.maps(images, [1]), range(8)))
    assert caplog.text.count("target layer of Spy: act") == 1
    assert all(torch.equal(each, maps[0]) for each in maps)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
