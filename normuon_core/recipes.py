"""Every published dialect of Muon and NorMuon as data: one small record a stage.

The fields of a record are the keywords of that stage's function, in JAX and in PyTorch alike.
`docs/stages.md` writes the formulas out; `parity_tests/oracle.py` runs them in float64.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Literal

from normuon_core.hyperparameters import (
    as_plain,
    check_choice,
    check_decay,
    check_number,
    check_radius,
    check_rate,
)
from normuon_core.neurons import NeuronAxis
from normuon_core.polynomials import (
    CUBIC,
    NEWTON_SCHULZ,
    POLAR_EXPRESS,
    Coefficients,
    find_coefficients,
    with_steps,
)
from normuon_core.shape_rules import ShapeRule, check_shape_rule

MomentumRule = Literal["lerp", "heavy_ball", "bias_corrected"]
EpsRule = Literal["add", "max"]
Preconditioning = Literal["frobenius", "aol"]
RatePower = Literal[1, 2]


@dataclass(frozen=True)
class Momentum:
    """Stage 1. `lerp`: m <- m + (1 - mu)(g - m). `heavy_ball`: m <- mu m + g. `bias_corrected`: Optax's
    own, lerp with each of its two terms divided by its 1 - mu^t."""

    rule: MomentumRule = "lerp"
    momentum: float = 0.95
    nesterov: bool = True

    def __post_init__(self):
        check_choice("momentum rule", self.rule, MomentumRule)
        check_decay("momentum", self.momentum)


@dataclass(frozen=True)
class RowEquilibration:
    """Before stage 2. Every row of u, one an output neuron, is multiplied by (|u|_F / sqrt(r)) /
    max(its norm, eps): it gets the root mean square of all rows' norms."""

    eps: float = 1e-6

    def __post_init__(self):
        check_number("row equilibration eps", self.eps)
        check_rate("eps", self.eps)
        object.__setattr__(self, "eps", as_plain(self.eps))


@dataclass(frozen=True)
class Polar:
    """Stage 2. X = u / max(norm_scale |u|, eps), or u / (norm_scale |u| + eps) with `eps_rule="add"`;
    then one odd quintic a step.

    As a floor below any gradient that trains, the default eps only brings what is smaller to zero;
    float32 squares that underflow are below it.

    `preconditioning="aol"` goes on from there: with A the Gram matrix of X's shorter side and s_i =
    1 / sqrt(sum_j |A_ij|), X <- diag(s) X before the first step, so that no singular value is above 1
    whatever the norm was. A row of zeros stays one. Source: Turbo-Muon, arXiv 2512.04632.
    """

    coefficients: Coefficients = POLAR_EXPRESS
    norm_scale: float = 1.02
    eps: float = 1e-17
    eps_rule: EpsRule = "max"
    preconditioning: Preconditioning = "frobenius"

    def __post_init__(self):
        # A table read from a file may be a list, which no cache can be keyed by.
        object.__setattr__(self, "coefficients", find_coefficients(self.coefficients))
        check_choice("eps_rule", self.eps_rule, EpsRule)
        check_choice("preconditioning", self.preconditioning, Preconditioning)
        check_number("norm_scale", self.norm_scale)
        check_number("polar eps", self.eps)
        check_rate("norm_scale", self.norm_scale)
        check_rate("eps", self.eps)
        object.__setattr__(self, "norm_scale", as_plain(self.norm_scale))
        object.__setattr__(self, "eps", as_plain(self.eps))


@dataclass(frozen=True)
class NormSetting:
    """After stage 2. v <- v sqrt(min(r, c)) / max(|v|_F, eps): the norm of an exact polar factor."""

    eps: float = 1e-6

    def __post_init__(self):
        check_number("norm setting eps", self.eps)
        check_rate("eps", self.eps)
        object.__setattr__(self, "eps", as_plain(self.eps))


@dataclass(frozen=True)
class NeuronNorm:
    """Stage 3. The second moment s of one side's neurons divides v by sqrt(max(s, eps))
    (`eps_rule="max"`) or by sqrt(s) + eps (`"add"`); `rescale` gives the matrix its norm back, over
    max(norm, eps) or norm + eps, or not at all (None)."""

    beta2: float = 0.95
    axis: NeuronAxis = "output"
    eps: float = 1e-10
    eps_rule: EpsRule = "max"
    rescale: EpsRule | None = "max"

    def __post_init__(self):
        check_decay("beta2", self.beta2)
        check_choice("axis", self.axis, NeuronAxis)
        check_rate("eps", self.eps)
        check_choice("eps_rule", self.eps_rule, EpsRule)
        if self.rescale is not None:
            check_choice("rescale", self.rescale, EpsRule)
        object.__setattr__(self, "eps", as_plain(self.eps))


@dataclass(frozen=True)
class Decay:
    """Stage 4. `cautious`: only where the update and the parameter agree in sign. `inside_scale`: the
    decay term is multiplied by shape scale and `lr_mul` as the update is. `rate_power`: how often the
    learning rate multiplies it."""

    cautious: bool = True
    inside_scale: bool = True
    rate_power: RatePower = 1

    def __post_init__(self):
        check_choice("rate_power", self.rate_power, RatePower)


@dataclass(frozen=True)
class Hyperball:
    """In place of stage 6: w <- R N(w - eta lr_mul R N(u)) of every matrix, with N(x) = x / |x|, so that
    its Frobenius norm stays `radius` (None: what it was at the start). u is what the other stages have
    made; its size, and so the shape scale, does not matter."""

    radius: float | None = None

    def __post_init__(self):
        check_radius("radius", self.radius)
        object.__setattr__(self, "radius", as_plain(self.radius))


@dataclass(frozen=True)
class Recipe:
    """One dialect, stage by stage; `neuron_norm=None` is plain Muon, `hyperball=None` a step in flat
    space.

    `row_equilibration` and `norm_setting` stand before and after the polar factor, where a recipe has
    them.

    `dataclasses.replace` makes a variant: `replace(RECIPES["normuon"], shape_scale="spectral")`.
    It and its records check themselves when they are made: an unknown rule, or a number out of its
    range, is a ValueError there. Momentum and beta2 may also be what a framework traces.
    """

    momentum: Momentum
    polar: Polar
    neuron_norm: NeuronNorm | None
    decay: Decay
    shape_scale: ShapeRule
    source: str
    row_equilibration: RowEquilibration | None = None
    norm_setting: NormSetting | None = None
    hyperball: Hyperball | None = None

    def __post_init__(self):
        check_shape_rule(self.shape_scale)

    def override(
        self,
        *,
        momentum=None,
        nesterov=None,
        beta2=None,
        shape_scale=None,
        coefficients=None,
        steps=None,
        eps=None,
    ) -> "Recipe":
        """The recipe with the fields that people tune replaced; None keeps the recipe's own.

        Args:
          coefficients: of the polar factor, see `find_coefficients`. steps: how many of them, see
            `with_steps`. eps: the polar factor's, by the recipe's own rule.

        Raises:
          ValueError: `beta2` for a recipe without neuron normalization, an unknown `shape_scale` or set
            of coefficients, more steps than it has, or a number out of its range.
        """
        recipe = self
        if momentum is not None:
            stage = dataclasses.replace(recipe.momentum, momentum=momentum)
            recipe = dataclasses.replace(recipe, momentum=stage)
        if nesterov is not None:
            stage = dataclasses.replace(recipe.momentum, nesterov=nesterov)
            recipe = dataclasses.replace(recipe, momentum=stage)
        if beta2 is not None:
            if recipe.neuron_norm is None:
                raise ValueError(
                    f"beta2={beta2} has no effect: this recipe has no neuron normalization. Leave beta2"
                    " out, or choose a NorMuon recipe such as 'normuon'."
                )
            stage = dataclasses.replace(recipe.neuron_norm, beta2=beta2)
            recipe = dataclasses.replace(recipe, neuron_norm=stage)
        if shape_scale is not None:
            recipe = dataclasses.replace(recipe, shape_scale=shape_scale)
        polar = recipe.polar
        if coefficients is not None:
            polar = dataclasses.replace(polar, coefficients=find_coefficients(coefficients))
        if steps is not None:
            polar = dataclasses.replace(polar, coefficients=with_steps(polar.coefficients, steps))
        if eps is not None:
            polar = dataclasses.replace(polar, eps=eps)
        return recipe if polar is recipe.polar else dataclasses.replace(recipe, polar=polar)


_NS5 = Polar(NEWTON_SCHULZ, norm_scale=1.0, eps=1e-7, eps_rule="add")
_POLAR_EXPRESS = Polar()
_POLAR_EXPRESS_ADD = Polar(eps=1e-6, eps_rule="add")
_PLAIN = Decay(cautious=False, inside_scale=False)
_RATE_TWICE = Decay(cautious=True, inside_scale=True, rate_power=2)
_HEAVY_BALL = Momentum("heavy_ball")

_NORMUON = Recipe(
    Momentum(),
    _POLAR_EXPRESS,
    NeuronNorm(),
    Decay(),
    "original",
    "optax_normuon: NorMuon's second moment over the paper's axis (arXiv 2510.05491), Polar Express"
    " (arXiv 2505.16932), cautious weight decay (arXiv 2510.12402)",
)
_MODDED = Recipe(
    Momentum(),
    _POLAR_EXPRESS_ADD,
    NeuronNorm(axis="longer"),
    _RATE_TWICE,
    "original",
    "KellerJordan/modded-nanogpt 056306ba (2025-11-18)",
)
_DION_NORMUON = Recipe(
    Momentum("heavy_ball", nesterov=False),
    dataclasses.replace(_POLAR_EXPRESS_ADD, eps=1e-8),
    NeuronNorm(eps=1e-8, eps_rule="add"),
    _PLAIN,
    "spectral",
    "microsoft/dion 0a059a4, dion/normuon.py",
)
_MUON_H = dataclasses.replace(
    _NORMUON,
    neuron_norm=None,
    decay=_PLAIN,
    shape_scale="none",
    hyperball=Hyperball(),
    source="MuonH, https://tinyurl.com/muonh (2025-12-15), with the polar factor of `muon`; NVIDIA"
    " Emerging-Optimizers 0.3.0, muon_hyperball.py",
)

RECIPES: dict[str, Recipe] = {
    "normuon": _NORMUON,
    "muon": dataclasses.replace(
        _NORMUON, neuron_norm=None, source="optax_normuon: `normuon` without its second moment"
    ),
    "normuon_paper": Recipe(
        Momentum(nesterov=False),
        _NS5,
        NeuronNorm(eps=1e-8, eps_rule="add", rescale=None),
        _PLAIN,
        "rms",
        "NorMuon, arXiv 2510.05491, Algorithm 1",
    ),
    "normuon_official": Recipe(
        Momentum(),
        _NS5,
        NeuronNorm(eps_rule="add", rescale="add"),
        _PLAIN,
        "original",
        "zichongli5/NorMuon d45c9a4",
    ),
    "normuon_2025_11": _MODDED,
    "normuon_2025_12": dataclasses.replace(
        _MODDED, source="KellerJordan/modded-nanogpt 9060ff47 (2025-12-25)"
    ),
    "normuon_2026_08": dataclasses.replace(
        _MODDED,
        neuron_norm=NeuronNorm(beta2=0.9, axis="longer"),
        source="KellerJordan/modded-nanogpt f411b3d3 (2026-08-01)",
    ),
    "dion_normuon": _DION_NORMUON,
    "dion_muon": dataclasses.replace(
        _DION_NORMUON, neuron_norm=None, source="microsoft/dion 0a059a4, dion/muon.py"
    ),
    "nanochat": Recipe(
        Momentum(),
        dataclasses.replace(_POLAR_EXPRESS_ADD, norm_scale=1.01),
        NeuronNorm(beta2=0.9, axis="longer"),
        Decay(),
        "original",
        "karpathy/nanochat 92d63d4, nanochat/optim.py; rows equilibrated as in MuonEq (arXiv"
        " 2603.28254), norm set as in Muon+ (arXiv 2602.21545)",
        RowEquilibration(),
        NormSetting(),
    ),
    "muon_2024_10": Recipe(
        _HEAVY_BALL,
        _NS5,
        None,
        _PLAIN,
        "max_dim",
        "KellerJordan/modded-nanogpt, record 2024-10-10_Muon (it has no weight decay)",
    ),
    "muon_keller": Recipe(Momentum(), _NS5, None, _PLAIN, "original", "KellerJordan/Muon 857d1ad"),
    "moonlight": Recipe(
        _HEAVY_BALL,
        _NS5,
        None,
        _PLAIN,
        "match_rms_adamw",
        "MoonshotAI/Moonlight c2ad5b2, arXiv 2502.16982",
    ),
    "torch_muon": Recipe(
        Momentum(),
        dataclasses.replace(_NS5, eps_rule="max"),
        None,
        _PLAIN,
        "original",
        "torch.optim.Muon 2.13",
    ),
    "optax_muon": Recipe(
        Momentum("bias_corrected"),
        dataclasses.replace(_NS5, eps=1e-8),
        None,
        _PLAIN,
        "original",
        "optax.contrib.muon 0.2.8",
    ),
    "muon_basic": Recipe(
        Momentum(),
        _POLAR_EXPRESS,
        None,
        _PLAIN,
        "none",
        "lerp momentum, Polar Express and plain decay, unscaled",
    ),
    "muon_complete": Recipe(
        _HEAVY_BALL,
        _POLAR_EXPRESS,
        None,
        _PLAIN,
        "max_dim",
        "heavy ball, Polar Express, plain decay, scaled by the longer side",
    ),
    "simple_muon": Recipe(
        Momentum("heavy_ball", nesterov=False),
        Polar(CUBIC, norm_scale=1.0, eps=1e-7, eps_rule="add"),
        None,
        _PLAIN,
        "none",
        "heavy ball and the classical cubic iteration, unscaled",
    ),
    "muon_h": _MUON_H,
    "normuon_h": dataclasses.replace(
        _MUON_H,
        neuron_norm=NeuronNorm(),
        source="optax_normuon: `muon_h` with the second moment of `normuon`. With another polynomial and"
        " axis NorMuonH of KellerJordan/modded-nanogpt, track 3, 20260430_normuonh",
    ),
}


def find_recipe(recipe: "str | Recipe") -> Recipe:
    """The Recipe of that name, or the Recipe itself.

    Raises:
      ValueError: an unknown name; the message has the nearest known one.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe in RECIPES:
        return RECIPES[recipe]
    near = difflib.get_close_matches(str(recipe), RECIPES, n=1, cutoff=0.0)
    raise ValueError(
        f"unknown recipe {recipe!r}; did you mean {near[0]!r}? Known recipes: {', '.join(RECIPES)}."
    )
