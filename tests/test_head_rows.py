"""Heads that compute the wanted rows alone, against the network itself, and how many multiplications they take."""

import pytest
import torch
from networks import vit, whole_network
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cfcam_gpu import head, head_rows
from cfcam_gpu.boxes import Factor, NotABox, contains, lengths, merged, part, reshaped, whole
from cfcam_gpu.head import record_head
from cfcam_gpu.head_steps import Rows

pytestmark = [pytest.mark.usefixtures("one_thread", "seed")]

D, N = 32, 17
"""Channels and tokens of the networks here; their patches are a quarter of a side of 32 pixels."""


def torchvision_vit():
    model = vit(64, layers=2)
    model.heads.head = nn.Linear(128, 10)
    return model, model.encoder.layers[-1].ln_1, 64, 128, N


def timm_vit(name="vit_tiny_patch16_224"):
    timm = pytest.importorskip("timm", reason="timm is not installed (extra: timm)")
    model = timm.create_model(name, img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=10).eval()
    return model, model.blocks[-1].norm1, 64, 48, N + ("distilled" in name)


def distilled():
    return timm_vit("deit_tiny_distilled_patch16_224")


def hugging_face_vit(attention="sdpa"):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")
    size = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * D}
    config = transformers.ViTConfig(image_size=32, patch_size=8, attn_implementation=attention, **size)
    model = Logits(transformers.ViTForImageClassification(config).eval())
    (layer,) = [each for name, each in model.named_modules() if name.endswith("1.layernorm_before")]
    return model, layer, 32, D, N


def unfused():
    return hugging_face_vit("eager")


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images).logits


class Encoder(nn.Module):
    """torch's own layers, with what comes of the tokens left to ``pool``."""

    def __init__(self, pool, d=D):
        super().__init__()
        block = lambda: nn.TransformerEncoderLayer(d, 2, 4 * d, batch_first=True, norm_first=True, activation="gelu")
        self.patches, self.body = nn.Conv2d(3, d, 8, 8), nn.ModuleList([block(), block()])
        self.cls, self.fc, self.pool = nn.Parameter(torch.randn(1, 1, d)), nn.Linear(d, 10), pool

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.body:
            tokens = block(tokens)
        return self.fc(self.pool(tokens))


def encoder(pool=lambda tokens: tokens[:, 0]):
    model = Encoder(pool).eval()
    return model, model.body[-1].norm1, 32, D, N


def last_of_a_list():
    return encoder(lambda tokens: tokens[:, [-1]].squeeze(1))


def multiplications(head, activations):
    with FlopCounterMode(display=False) as counter:
        result = head(activations)
    return result, counter.get_total_flops() / 2


NETWORKS = [torchvision_vit, timm_vit, distilled, hugging_face_vit, unfused, encoder, last_of_a_list]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_class_tokens(network, batch):
    model, layer, size, d, n = network()
    model.requires_grad_(False)
    images, others = torch.randn(2, batch, 3, size, size)
    head = record_head(model, layer, images)
    assert head.reason is None
    for recorded, of in ((head, images), (head.renewed(model, others), others)):
        activations = recorded.activations.repeat_interleave(3, 0)
        activations = (activations + 0.3 * torch.randn_like(activations)).requires_grad_()
        expected = whole_network(model, layer, of.repeat_interleave(3, 0), activations)
        found, n_run = multiplications(recorded, activations)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        cotangent = torch.randn_like(found)
        pair = [torch.autograd.grad((each * cotangent).sum(), activations)[0] for each in (found, expected)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5 * pair[1].abs().max().item())
        assert pair[0][:, 1:].any(), "keys and values are of all tokens"
        # Keys and values of all tokens; all else of one, or of two in the distilled network.
        ours = 3 * batch * (2 * n * d**2 + 2 * (10 * d**2 + 2 * n * d) + 2 * d * found.shape[1])
        assert n_run <= ours < 0.4 * 3 * batch * 12 * n * d**2


@pytest.mark.parametrize(
    "pool",
    [
        lambda tokens: tokens.mean(1),
        lambda tokens: tokens[:, 1:].mean(1) + tokens[:, 0],
        lambda tokens: tokens.cumsum(1)[:, -1],
        lambda tokens: tokens[torch.arange(len(tokens)), 0] + tokens.amax(1),
    ],
)
def test_where_all_tokens_are_wanted_nothing_changes(pool):
    model, layer, size, *_ = encoder(pool)
    images = torch.randn(2, 3, size, size)
    head = record_head(model, layer, images)
    with torch.no_grad():
        activations = torch.randn_like(head.activations)
        expected = whole_network(model, layer, images, activations)
    found, n_run = multiplications(head, activations)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert n_run >= 2 * 12 * N * D**2


class Attention(nn.Module):
    """Of few queries, with what else attention may have."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.qkv, self.how = nn.Linear(6, D), nn.Linear(D, 3 * D), how
        self.register_buffer("bias", torch.randn(N, N))

    def forward(self, x):
        qkv = self.qkv(self.layer(x))
        q, k, v = qkv.unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
        how = {"mask": {"attn_mask": self.bias}, "scale": {"scale": 0.3}, "causal": {"is_causal": True}}.get(
            self.how, {}
        )
        if self.how == "chunks":
            q, k, v = (part.unflatten(2, (2, D // 2)).transpose(1, 2) for part in qkv.split(D, -1))
        out = F.scaled_dot_product_attention(q, k, v, **how)
        if self.how == "softmax":
            out = (q @ k.mT * 0.2 + self.bias[:, :1]).softmax(-1) @ v
        elif self.how == "baddbmm":
            scores = torch.baddbmm(self.bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5)
            out = (scores.log_softmax(-1).exp() @ v.flatten(0, 1)).unflatten(0, (-1, 2))
        out = F.rms_norm(out.transpose(1, 2).flatten(2), (D,)).clamp(-1)
        return torch.cat([out, out.square()], 1)[:, 3:5].sum(1)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("how", ["mask", "scale", "causal", "chunks", "softmax", "baddbmm"])
def test_attention(how, backend):
    model = Attention(how).eval()
    x = torch.randn(2, N, 6)
    with sdpa_kernel(backend):
        head = record_head(model, model.layer, x)
        activations = torch.randn(4, N, D, requires_grad=True)
        expected = whole_network(model, model.layer, x.repeat_interleave(2, 0), activations)
        found, n_run = multiplications(head, activations)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    pair = [torch.autograd.grad(each.sin().sum(), activations)[0] for each in (found, expected)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    limit = 4 * (2 * N * D**2 + 2 * D**2 + 2 * 2 * N * D)
    causal = how == "causal" and backend is SDPBackend.FLASH_ATTENTION  # of some rows it would be another mask
    assert (n_run > limit) == causal


def test_attention_on_a_device_keeps_what_its_backward_needs():
    function = torch.ops.aten._scaled_dot_product_efficient_attention.default
    assert head._for_a_backward(function, ["q", "k", "v", None, False, 0.0]) == ["q", "k", "v", None, True, 0.0]
    assert head._for_a_backward(torch.ops.aten.mm.default, ["a", False]) == ["a", False]


def test_a_wrong_rule_is_found_out(monkeypatch):
    """A reduced head that gives something else than the network is not used."""
    monkeypatch.setitem(
        head_rows.RULES,
        torch.ops.aten.gelu,
        lambda call: (torch.ops.aten.relu.default, ((head_rows._Want(call.given["self"], call.box),), {})),
    )
    model, layer, size, *_ = encoder()
    images = torch.randn(2, 3, size, size)
    head = record_head(model, layer, images)
    assert head.reason is None
    with torch.no_grad():
        torch.testing.assert_close(head(head.activations), model(images), rtol=1e-5, atol=1e-5)


def test_boxes():
    """Through changes of shape, against what indexing gives."""
    x = torch.arange(2 * 6 * 4).view(2, 6, 4)
    sizes = [Rows(1), 6, 4]
    box = (*whole(sizes)[:1], part(6, 2, 2), part(4, 0, 1))
    assert lengths(box) == [Rows(1), 2, 1]
    for shape, of in (
        ([Rows(6), 4], x.view(12, 4)),
        ([Rows(1), 3, 2, 4], x.view(2, 3, 2, 4)),
        ([Rows(24)], x.view(48)),
    ):
        other = reshaped(box, shape)
        at = []
        for axis in other:
            places = torch.zeros(1, dtype=torch.int64)
            for factor in axis:
                size = 2 * factor.size.factor if isinstance(factor.size, Rows) else factor.size
                chosen = torch.arange(size)[factor.start :][: factor.length]
                places = (places[:, None] * size + chosen).flatten()
            at.append(places)
        assert of[torch.meshgrid(*at, indexing="ij")].flatten().equal(x[:, 2:4, :1].flatten())
        assert reshaped(other, sizes) == box
    with pytest.raises(NotABox):
        reshaped((part(6, 1, 3),), [3, 2])
    everything = whole([Rows(1), 6])
    row = lambda start, length=1: (*everything[:1], part(6, start, length))
    of_eight = lambda start, length=1: (*everything[:1], part(8, start, length))
    assert merged([of_eight(0), of_eight(1)], whole([Rows(1), 8])) == [of_eight(0, 2)]
    assert sorted(merged([row(0), row(5)], everything)) == [row(0), row(5)]
    assert merged([row(0, 5), row(2, 2)], everything) == [row(0, 5)] and contains(row(0, 5), row(2, 2))
    assert merged([row(0, 5), row(5)], everything) == [everything]
    assert len(merged([row(0, 2), row(2, 3)], everything)) == 2, "large ones that touch"
    assert merged([row(0, 3), row(2, 3)], everything) == [row(0, 5)]
    assert part(6, 0, 6) == (Factor(6),) and not contains(row(0), everything)
