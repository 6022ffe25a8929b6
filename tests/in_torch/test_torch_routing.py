"""`torch_ref.param_groups` and `describe`: which parameters of a model are matrices, and how."""

import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from normuon_core import MatrixLayout
from torch_ref import NorMuon, describe, param_groups

RATES = {"lr": 0.02, "adam_lr": 3e-4}
OUT_IN, IN_OUT = MatrixLayout(-1, -2), MatrixLayout(-2, -1)


def split(*sizes):
    return MatrixLayout(-1, -2, sizes)


def roles(model, **keywords):
    """The layout of every matrix by name, "adamw" for the rest."""
    groups = param_groups(model, **RATES, **keywords)
    return {name: group.get("layout", "adamw") for group in groups for name in group["param_names"]}


def hidden(module):
    """Beside a head, so that the module's own last layer is none."""
    return nn.ModuleDict({"x": module, "head": nn.Linear(3, 4)})


class Conv1D(nn.Module):
    """As Hugging Face's."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.zeros(inputs, outputs)),
            nn.Parameter(torch.zeros(outputs)),
        )


class RMSNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


class QuantLinear(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.weight = nn.Parameter(torch.ones(shape))


TWO_D = MatrixLayout((1, 2, 3), 0)
MODULES = [
    (nn.Linear(5, 4), {"weight": OUT_IN, "bias": "adamw"}),
    (nn.Linear(5, 1), {"weight": "adamw", "bias": "adamw"}),
    (nn.Embedding(5, 4), {"weight": "adamw"}),
    (nn.EmbeddingBag(5, 4), {"weight": "adamw"}),
    (nn.LayerNorm((3, 4)), {"weight": "adamw", "bias": "adamw"}),
    (RMSNorm2d(), {"weight": "adamw"}),
    (nn.Conv1d(4, 6, 3, bias=False), {"weight": MatrixLayout((1, 2), 0)}),
    (nn.Conv2d(4, 6, 3, bias=False), {"weight": TWO_D}),
    (nn.Conv3d(4, 6, 3, bias=False), {"weight": MatrixLayout((1, 2, 3, 4), 0)}),
    (nn.Conv2d(4, 8, 3, groups=4, bias=False), {"weight": "adamw"}),
    (nn.Conv2d(4, 6, 3, groups=2, bias=False), {"weight": MatrixLayout((1, 2, 3), 0, (3, 3))}),
    (nn.Conv2d(6, 2, 3, groups=2, bias=False), {"weight": "adamw"}),
    (nn.ConvTranspose2d(4, 6, 3, bias=False), {"weight": MatrixLayout(0, (1, 2, 3))}),
    (nn.ConvTranspose1d(4, 4, 3, groups=4, bias=False), {"weight": "adamw"}),
    (
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {
            "in_proj_weight": split(4, 4, 4),
            "in_proj_bias": "adamw",
            "bias_k": "adamw",
            "bias_v": "adamw",
            "out_proj.weight": OUT_IN,
            "out_proj.bias": "adamw",
        },
    ),
    (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False),
        {
            "q_proj_weight": OUT_IN,
            "k_proj_weight": OUT_IN,
            "v_proj_weight": OUT_IN,
            "out_proj.weight": OUT_IN,
        },
    ),
    (
        nn.LSTM(5, 6, proj_size=2, bias=False),
        {
            "weight_ih_l0": split(6, 6, 6, 6),
            "weight_hh_l0": split(6, 6, 6, 6),
            "weight_hr_l0": OUT_IN,
        },
    ),
    (
        nn.GRU(5, 6, bidirectional=True, bias=False),
        {
            "weight_ih_l0": split(6, 6, 6),
            "weight_hh_l0": split(6, 6, 6),
            "weight_ih_l0_reverse": split(6, 6, 6),
            "weight_hh_l0_reverse": split(6, 6, 6),
        },
    ),
    (nn.GRUCell(5, 6, bias=False), {"weight_ih": split(6, 6, 6), "weight_hh": split(6, 6, 6)}),
    (nn.RNN(5, 6, bias=False), {"weight_ih_l0": OUT_IN, "weight_hh_l0": OUT_IN}),
    (nn.Bilinear(3, 4, 5, bias=False), {"weight": MatrixLayout((1, 2), 0)}),
    (nn.PReLU(4), {"weight": "adamw"}),
    (Conv1D(8, 4), {"weight": MatrixLayout(0, 1), "bias": "adamw"}),
    (
        nn.ModuleDict({"c_attn": Conv1D(12, 4)}),
        {"c_attn.weight": MatrixLayout(0, 1, (4, 4, 4)), "c_attn.bias": "adamw"},
    ),
    (QuantLinear((4, 6)), {"weight": OUT_IN}),
    (QuantLinear((6, 4)), {"weight": IN_OUT}),
    (
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 4, bias=False)),
        {"parametrizations.weight.original0": "adamw", "parametrizations.weight.original1": OUT_IN},
    ),
    (
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 6, 3, bias=False)),
        {"parametrizations.weight.original": TWO_D},
    ),
    (
        nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Conv2d(3, 8, 4, bias=False)})}),
        {"patch_embed.proj.weight": "adamw"},
    ),
    (
        nn.ParameterDict({"pos_embed": torch.zeros(1, 5, 4), "ls_gamma": torch.zeros(3, 4)}),
        {"pos_embed": "adamw", "ls_gamma": "adamw"},
    ),
]


@pytest.mark.parametrize(
    ("module", "expected"), MODULES, ids=[type(module).__name__ for module, _ in MODULES]
)
def test_the_type_of_a_module_decides(module, expected):
    found = roles(hidden(module))
    own = {name.removeprefix("x."): role for name, role in found.items() if name[0] == "x"}
    assert own == expected


def mlp(*sizes):
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))


def blocks(count, head=None):
    model = nn.ModuleDict({"layers": nn.ModuleList(hidden_block() for _ in range(count))})
    if head is not None:
        model[head] = nn.Linear(4, 9, bias=False)
    return model


def hidden_block():
    return nn.ModuleDict({"up": nn.Linear(4, 8, bias=False), "down": nn.Linear(8, 4, bias=False)})


HEADS = [
    (mlp(6, 5, 4), {"1.weight"}),
    (mlp(4, 4, 4), {"1.weight"}),
    (nn.Sequential(mlp(6, 5), mlp(5, 3)), {"1.0.weight"}),
    (nn.Sequential(hidden_block(), hidden_block()), set()),
    (blocks(3), set()),
    (blocks(1), set()),
    (blocks(2, "lm_head"), {"lm_head.weight"}),
    (blocks(2, "anything"), {"anything.weight"}),
    (nn.ModuleDict({"output": nn.Linear(4, 3, bias=False), "b": blocks(2)}), {"output.weight"}),
    (
        nn.ModuleDict(
            {
                "attention": nn.ModuleDict({"x": nn.ModuleDict({"output": nn.Linear(4, 5)})}),
                "classifier": nn.Linear(4, 3, bias=False),
            }
        ),
        {"classifier.weight"},
    ),
    (nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, bias=False), 2), set()),
]


@pytest.mark.parametrize(("model", "heads"), HEADS, ids=range(len(HEADS)))
def test_the_head_is_the_layer_called_so_or_the_last_linear_outside_of_blocks(model, heads):
    found = roles(model)
    matrices = {name for name, param in model.named_parameters() if param.ndim > 1}
    assert {name for name in matrices if found[name] == "adamw"} == heads


def test_a_tied_weight_is_there_once_with_its_embedding():
    model = nn.ModuleDict({"wte": nn.Embedding(9, 4), **blocks(1, "lm_head")})
    model["lm_head"].weight = model["wte"].weight
    assert roles(model) == {
        "wte.weight": "adamw",
        "layers.0.up.weight": OUT_IN,
        "layers.0.down.weight": OUT_IN,
    }
    assert "embedding, tied to lm_head" in describe(model)


def test_frozen_parameters_are_left_out():
    model = mlp(6, 5, 4)
    model[0].weight.requires_grad_(False)
    assert roles(model) == {"1.weight": "adamw"}


def test_keywords_go_into_the_groups_that_they_concern():
    groups = param_groups(
        mlp(6, 5, 4), **RATES, recipe="muon", weight_decay=0.1, adam_b1=0.8, bf16_remainder=True
    )
    optimizer = NorMuon(groups, lr=1.0)
    matrices, others = optimizer.param_groups
    wanted = {"recipe": "muon", "weight_decay": 0.1, "lr": 0.02, "bf16_remainder": True}
    assert wanted.items() <= matrices.items()
    wanted = {"betas": (0.8, 0.95), "weight_decay": 0.0, "lr": 3e-4, "bf16_remainder": True}
    assert wanted.items() <= others.items()
    assert (matrices["param_names"], others["param_names"]) == (["0.weight"], ["1.weight"])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(shape)) for shape in ((2, 3, 4), (3, 4)))


def test_what_cannot_be_known_is_asked_about_once_with_an_answer_to_paste():
    model = nn.ModuleDict(
        {"moe": Experts(), "up": nn.ConvTranspose1d(4, 4, 2, groups=2, bias=False)}
    )
    with pytest.raises(ValueError, match=r"3 of the model's parameters can be read") as error:
        param_groups(model, **RATES)
    message = str(error.value)
    assert "moe.w1: shape (2, 3, 4) can be read in 4 ways" in message
    assert message.split("\n\n", 1)[1].split("\n\n")[1] in describe(model)
    (answer,) = re.findall(r"layouts=(\{.*\})", message, re.DOTALL)
    answered = eval(answer, {"torch_ref": __import__("torch_ref")})
    assert roles(model, layouts=answered) == {
        "moe.w1": OUT_IN,
        "moe.w2": OUT_IN,
        "up.weight": "adamw",
    }
    assert roles(model, layouts={"moe.*": IN_OUT, "*": None})["moe.w1"] == IN_OUT


@pytest.mark.parametrize(
    ("model", "keywords", "message"),
    [
        (mlp(6, 5), {"recipes": "muon"}, "nothing reads the key 'recipes'; did you mean 'recipe'"),
        (mlp(6, 5), {"layout": OUT_IN}, "nothing reads the key 'layout'"),
        (mlp(6, 5), {"layouts": {"blocks.*": None}}, r"'blocks.\*' fits no parameter; .* 0.weight"),
        (mlp(6, 5), {"layouts": {"*": MatrixLayout(0, 2)}}, "0.weight: .* runs past the rank"),
        (nn.LazyLinear(4), {}, "weight: its shape is not known; run the model once"),
    ],
    ids=range(5),
)
def test_what_does_not_fit_a_model_is_refused(model, keywords, message):
    with pytest.raises(ValueError, match=message):
        param_groups(model, **RATES, **keywords)
    with pytest.raises(ValueError, match=message):
        describe(model, **keywords)


def matrices_of(module, x):
    """Each group's linear map as a matrix (out, in), from what the module does to `x`."""
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x[None])[0].flatten(), x)
    return jacobian.reshape(jacobian.shape[0], -1)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 2, groups=2, bias=False),
        nn.ConvTranspose2d(4, 3, 2, bias=False),
        nn.Conv1d(4, 6, 3, bias=False),
    ],
    ids=["grouped", "transposed", "plain"],
)
def test_a_convolutions_update_is_orthogonal_as_the_map_that_it_makes(module):
    """On one patch, or from one position, a convolution is a matrix; that of the update has singular
    values of one, in each group."""
    module = module.double()
    patch = module.kernel_size if not module.transposed else (1,) * len(module.kernel_size)
    (group,) = param_groups(hidden(module), **RATES, recipe="muon", shape_scale="none")[:1]
    svd = torch.linalg.svd
    group |= {"orthogonalizer": lambda u: (lambda s: s.U @ s.Vh)(svd(u, full_matrices=False))}
    optimizer = NorMuon([group], lr=1.0)
    module.weight.grad = torch.randn(
        module.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    start = module.weight.detach().clone()
    optimizer.step()
    with torch.no_grad():
        module.weight.sub_(start)
    x = torch.zeros(module.in_channels, *patch, dtype=torch.float64)
    matrix = matrices_of(module, x)
    values = torch.linalg.svdvals(matrix)
    # Measured: 1.2e-15.
    torch.testing.assert_close(values / group["lr"], torch.ones_like(values), rtol=0, atol=5e-15)


def test_a_described_model_names_its_optimizers_and_counts_their_state():
    text = describe(
        blocks(12, "lm_head"), recipe="moonlight", lr=0.1, momentum_dtype=torch.bfloat16
    )
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert lines[0] == [
        *("path", "leaves", "shape", "matrices x (out, in)", "optimizer", "scale", "why")
    ]
    assert lines[2] == [
        *("layers.{0..11}.up.weight", "12", "8x4", "1 x (8, 4)", "Muon", "0.5657", "linear layer")
    ]
    assert lines[4][:4] == ["lm_head.weight", "1", "9x4", "AdamW"]
    assert lines[-2] == ["Muon", "24", "768", "95.5%", "1,536", "momentum 1,536"]
    moments = "first moment 144, second moment 144"
    assert lines[-1] == ["AdamW", "1", "36", "4.5%", "288", moments]


def test_a_description_counts_the_state_that_a_step_makes():
    model = hidden(nn.MultiheadAttention(4, 2)).bfloat16()
    keywords = {"bf16_remainder": True, "weight_decay": 0.1}
    optimizer = NorMuon(param_groups(model, **RATES, **keywords), lr=1.0)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    made = {"normuon": 0, "adamw": 0}
    for group in optimizer.param_groups:
        for param in group["params"]:
            for key, value in optimizer.state[param].items():
                arrays = value if isinstance(value, list) else [value]
                if key != "step":
                    made[group["optimizer"]] += sum(each.nbytes for each in arrays)
    totals = describe(model, **keywords).split("\n\n")[-1]
    for name, size in (("NorMuon", made["normuon"]), ("AdamW", made["adamw"])):
        assert re.search(rf"{name} .*%  {size}  ", totals)


def test_a_model_on_the_meta_device_can_be_described():
    with torch.device("meta"):
        model = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4), 12)
    text = describe(model)
    assert "layers.{0..11}.self_attn.in_proj_weight" in text
    assert "3 x (64, 64)" in text


def test_a_whole_model_trains():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0), nn.Linear(8, 9)
    )
    optimizer = NorMuon(param_groups(model, lr=0.02, adam_lr=0.02), lr=1.0)
    tokens = torch.arange(9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
