"""The verdict on a layer: correct results agree; each known fault is named in its stage and place, and no other."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import layer_torch
import layer_twin
import numpy as np
import pytest

from cpjax.crosscheck.judging.statistic import LIMIT
from cpjax.crosscheck.layer import formulas
from cpjax.crosscheck.layer.case import LayerCase
from cpjax.crosscheck.layer.computed import compute
from cpjax.crosscheck.layer.gating import is_choice
from cpjax.crosscheck.layer.judge import judge_layer, judge_stage
from cpjax.crosscheck.layer.lattice import measure, total_of
from cpjax.crosscheck.layer.result import LayerResult
from cpjax.crosscheck.layer.shape import result_tensors
from cpjax.crosscheck.layer.stages import stages_of
from cpjax.crosscheck.layer.verdict import LayerVerdict
from cpjax.deepseek.layer_cases import CONFIG, SET, layer_case
from cpjax.errors import InputError

NAMES = [small.name for small in SET]
FAULTS = [
    *(("0-dense-float", fault, *found) for fault, found in layer_twin.FAULTS.items()),
    *(("1-moe-float", fault, *found) for fault, found in layer_twin.FAULTS_OF_EXPERTS.items()),
    *(("3-dense-w8a8", fault, *found) for fault, found in layer_twin.FAULTS_OF_STATIC.items()),
    *(("5-dense-w8a8-dynamic", fault, *found) for fault, found in layer_twin.FAULTS_OF_DYNAMIC.items()),
    *(("8-moe-w4a8-vendor", fault, *found) for fault, found in layer_twin.FAULTS_OF_W4A8.items()),
    *(("9-moe-w4a8-groups-vendor", fault, *found) for fault, found in layer_twin.FAULTS_OF_GROUPS.items()),
]


@cache
def case_of(name: str, seed: int = 0, tokens: int = 64) -> LayerCase:
    return layer_case(next(small for small in SET if small.name == name), seed, tokens=tokens)


def judged(case: LayerCase, tensors: dict[str, np.ndarray]) -> LayerVerdict:
    wanted = result_tensors(case.config, case.is_moe, case.kinds, case.tokens)
    assert wanted.keys() == tensors.keys()
    assert {name: shape for name, (_, shape) in wanted.items()} == {name: x.shape for name, x in tensors.items()}
    return judge_layer(case, LayerResult("twin", tensors, {}))


# Correct results -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_correct_results_agree(name, seed):
    case = case_of(name, seed, 48)
    verdict = judged(case, layer_twin.layer(case))
    assert verdict.passed, verdict.sentences()
    assert all(one.z < LIMIT / 2 for one in verdict.stages), [(one.stage, one.z) for one in verdict.stages]
    assert not verdict.sentences()


@pytest.mark.parametrize("name", ["0-dense-float", "1-moe-float", "2-dense-float-no-q-lora", "6-moe-w8a8-dynamic"])
def test_pytorch_agrees(name):
    case = case_of(name, 5)
    verdict = judged(case, layer_torch.layer(case))
    assert verdict.passed, verdict.sentences()


def test_hidden_states_of_other_sizes_agree():
    """Tokens that repeat, outliers in a few columns, tiny numbers, zeros."""
    case = case_of("4-moe-w8a8")
    hidden = case.tensors["hidden"].copy()
    hidden[1:9] = hidden[0]
    hidden[:, 5] *= 60
    hidden[20] *= np.float16(1e-4)
    hidden[30] = 0
    case = replace(case, tensors=case.tensors | {"hidden": hidden})
    verdict = judged(case, layer_twin.layer(case))
    assert verdict.passed, verdict.sentences()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0-dense-float", "4-moe-w8a8", "8-moe-w4a8-vendor"])
def test_the_vendors_operators_are_right_and_it_is_said(name):
    """Their norms round twice; their rotations take cosines and sines in FP16."""
    case = case_of(name, 1)
    verdict = judged(case, layer_twin.layer(case, is_vendor=True))
    assert verdict.passed, verdict.sentences()
    said = [one.stage for one in verdict.stages if one.remarks]
    assert said == ["input_norm", "q_a_norm", "query", "c_kv", "k_rope", "post_norm"]
    norms, turns = verdict.sentences()
    assert norms.startswith("input_norm, q_a_norm, c_kv, post_norm: ")
    assert turns == "query, k_rope: agrees; cosines and sines are given as FP16, as the vendor's operators take them"


@pytest.mark.parametrize("fault", ["eps of the config", "eps 1e-6", "weight of the norm", "rope halves", "positions"])
def test_faults_in_the_vendors_precision_are_named(fault):
    case, (stage, cause) = case_of("0-dense-float", 1), layer_twin.FAULTS[fault]
    verdict = judged(case, layer_twin.layer(case, fault, is_vendor=True))
    assert [one.stage for one in verdict.wrong] == [stage], verdict.sentences()
    assert any(cause in said for said in verdict.wrong[0].causes), verdict.wrong[0].causes


@pytest.mark.parametrize("columns", [64, 1024, 7168])
@pytest.mark.parametrize("mean", [0.0, 0.5])
@pytest.mark.parametrize("block", [1, 8, 16])
def test_sums_one_after_the_other_and_cut_off(columns, mean, block):
    """In float32 in order; or 8 or 16 products at once, cut off toward zero at 24 digits, as matrix units do."""
    rng = np.random.default_rng(columns)
    x = (rng.standard_normal((16, columns)) + mean).astype(np.float16).astype(float)
    weight = ((rng.standard_normal((48, columns)) + mean) / columns**0.5).astype(np.float16).astype(float)
    total = np.zeros((16, 48))
    for k in range(0, columns, block):
        total = total + x[:, k : k + block] @ weight[:, k : k + block].T
        fraction, exponent = np.frexp(total)
        digits = np.ldexp(fraction, 24)
        total = np.ldexp(np.rint(digits) if block == 1 else np.trunc(digits), exponent - 24)
    expected = formulas.linear(x, weight)
    found = measure(total.astype(np.float16), expected)
    assert (np.abs(total - expected.exact) <= expected.most).all()
    assert not found.outside.any()
    assert total_of(found, np.ones(16, bool)).z < 1


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fault", "stage", "cause"), FAULTS, ids=lambda x: str(x)[:28])
def test_each_known_fault_is_named_alone(name, fault, stage, cause):
    case = case_of(name)
    verdict = judged(case, layer_twin.layer(case, fault))
    assert [one.stage for one in verdict.wrong] == [stage], verdict.sentences()
    assert any(cause in said for said in verdict.wrong[0].causes), verdict.wrong[0].causes
    assert {one.outcome for one in verdict.stages} == {"agrees", "WRONG"}


def scaled(where: tuple, factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        y = x.astype(np.float32)
        y[where] *= np.float32(factor)
        return y.astype(x.dtype)

    return change


PLACES = [
    ("0-dense-float", "q_a_norm", (7,), "token 7"),
    ("0-dense-float", "kv_a", (slice(None), 100), "column 100"),
    ("0-dense-float", "query", (slice(None), 2), "head 2"),
    ("0-dense-float", "gate_up", (slice(20, 24), slice(None)), "tokens 20–23"),
    ("1-moe-float", "expert_down", (slice(None), slice(None), 9), "column 9"),
    ("1-moe-float", "expert_activated", (11,), "token 11"),
    ("1-moe-float", "routed", (3, 17), "token 3"),
    ("5-dense-w8a8-dynamic", "down", (40,), "token 40"),
]


@pytest.mark.parametrize(("name", "tensor", "where", "place"), PLACES, ids=lambda x: str(x)[:28])
def test_a_fault_in_one_place_is_found_there(name, tensor, where, place):
    case = case_of(name)
    verdict = judged(case, layer_twin.layer(case, alter={tensor: scaled(where, 1.01)}))
    assert [one.stage for one in verdict.wrong] == [tensor], verdict.sentences()
    assert place in verdict.wrong[0].where
    assert len(verdict.wrong[0].where) == (2 if tensor == "routed" else 1)
    assert not verdict.wrong[0].causes


def test_a_fault_in_one_expert_is_found_there():
    case = case_of("1-moe-float")
    right = layer_twin.layer(case)
    expert = int(np.bincount(right["expert_index"].ravel()).argmax())
    where = np.nonzero(right["expert_index"] == expert)
    verdict = judged(case, layer_twin.layer(case, alter={"expert_gate_up": scaled(where, 1.01)}))
    assert [one.stage for one in verdict.wrong] == ["expert_gate_up"]
    assert verdict.wrong[0].where == (f"expert {expert}",)


# What no bound of a single number sees: the factor of a whole stage at which it is called wrong, and one at which it is
# not. An exact value times the factor, rounded once.
SMALLEST = {
    "input_norm": (5e-7, 2e-6),
    "q_a": (2e-6, 2e-5),
    "query": (1e-7, 1e-6),
    "key_value": (1e-6, 1e-5),
    "o": (5e-6, 2e-5),
    "router_logits": (5e-8, 1e-6),
    "expert_gate_up": (2e-6, 1e-5),
    "expert_activated": (2e-7, 2e-6),
    "routed": (2e-7, 2e-6),
    "out": (0.0, 1e-8),  # ties: the float32 sum of such FP16 numbers is exact
}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_factor_that_is_seen(name):
    case = case_of("1-moe-float")
    there = layer_twin.layer(case)
    stage = next(one for one in stages_of(case) if one.name == name)
    given = there | {"hidden": case.tensors["hidden"]}
    inputs = {x: given[x].astype(np.int64 if given[x].dtype == np.int32 else np.float64) for x in stage.inputs}
    outcomes = []
    for factor in SMALLEST[name]:
        changed = {
            tensor: (one.exact * (1 + factor)).astype(there[tensor].dtype).reshape(there[tensor].shape)
            for tensor, one in compute(case, stage, inputs).items()
        }
        verdict = judge_stage(case, stage, there | changed)
        outcomes.append(verdict.outcome)
        assert verdict.ratio < 1.01, "by the bound alone, hardly"
    assert outcomes == ["agrees", "WRONG"]


def test_no_cause_is_stated_that_does_not_fit():
    """A fault that is nearly a known one: half of the residual forgotten."""
    case = case_of("0-dense-float")
    half = case.tensors["hidden"].astype(np.float32) / 2
    verdict = judged(
        case,
        layer_twin.layer(case, "residual", {"attended": lambda x: (x.astype(np.float32) + half).astype(np.float16)}),
    )
    assert [one.stage for one in verdict.wrong] == ["attended"]
    assert verdict.wrong[0].causes == ()


# NaN, ties, indices --------------------------------------------------------------------------------------------------


STAGE_OF = {"lse": "attention", "key": "key_value"}


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "tensor", ["input_norm", "kv_a", "query", "key", "attention", "lse", "router_logits", "expert_down", "out"]
)
def test_what_is_no_number_never_passes(tensor, bad):
    case = case_of("1-moe-float")
    there = layer_twin.layer(case)
    there[tensor] = there[tensor].copy()
    there[tensor].reshape(64, -1)[5, 3] = bad
    verdict = judged(case, there)
    assert not verdict.passed
    assert [one.stage for one in verdict.wrong] == [STAGE_OF.get(tensor, tensor)], verdict.sentences()
    assert all(one.outcome != "agrees" for one in verdict.stages if tensor in inputs_of(case, one.stage))


def inputs_of(case: LayerCase, name: str) -> tuple[str, ...]:
    return next(one.inputs for one in stages_of(case) if one.name == name)


def test_all_nan_never_passes():
    case = case_of("4-moe-w8a8")
    there = {
        name: np.full(x.shape, np.nan, x.dtype) if x.dtype.kind == "f" else x
        for name, x in layer_twin.layer(case).items()
    }
    verdict = judged(case, there)
    assert not verdict.passed
    assert verdict.wrong[0].stage == "input_norm"


@pytest.mark.parametrize("index", [-1, 16, 2**30])
def test_experts_that_are_none_are_wrong(index):
    case = case_of("1-moe-float")
    there = layer_twin.layer(case)
    there["expert_index"] = there["expert_index"].copy()
    there["expert_index"][9, 0] = index
    verdict = judged(case, there)
    assert verdict.wrong[0].stage == "router"
    assert "token 9" in verdict.wrong[0].where


def test_an_expert_twice_is_wrong():
    case = case_of("1-moe-float")
    there = layer_twin.layer(case)
    there["expert_index"] = there["expert_index"].copy()
    there["expert_index"][9, 0] = there["expert_index"][9, 1]
    assert "router" in [one.stage for one in judged(case, there).wrong]


def test_only_tied_experts_may_be_exchanged():
    """Choices that differ by a last bit of float32 may, by a thousandth may not; groups likewise."""
    config = replace(CONFIG, n_group=2, topk_group=1, n_routed_experts=8, num_experts_per_tok=2)
    logits = np.array([[2.0, 1.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0]])
    bias, chosen, other = np.zeros(8), np.array([[0, 1]]), np.array([[2, 0]])
    assert is_choice(logits, bias, config, chosen).all()
    assert is_choice(logits, bias, config, other).all()
    near = logits + np.array([0, 0, -1e-7, 0, 0, 0, 0, 0])
    assert is_choice(near, bias, config, other).all()
    far = logits + np.array([0, 0, -1e-3, 0, 0, 0, 0, 0])
    assert not is_choice(far, bias, config, other).any()
    assert is_choice(far, bias, config, chosen).all()
    twins = np.array([[2.0, 1.0, 0.0, 0.0, 2.0, 1.0, 0.0, 0.0]])
    for group, shift, is_right in ((0, 0, True), (4, 0, True), (4, -1e-7, True), (4, -1e-3, False)):
        moved = twins + shift * (np.arange(8) >= 4)
        assert is_choice(moved, bias, config, np.array([[group, group + 1]])).all() == is_right
    assert not is_choice(twins, bias, config, np.array([[0, 4]])).any()


def test_the_order_of_a_tokens_experts_is_free():
    case = case_of("6-moe-w8a8-dynamic")
    there = layer_twin.layer(case)
    of_experts = [x for x in there if x.startswith("expert_") and not x.startswith(("expert_gate_up.",))]
    verdict = judged(case, there | {name: there[name][:, ::-1].copy() for name in of_experts})
    assert verdict.passed, verdict.sentences()


def test_integers_are_exact_but_for_ties():
    """x / scale half way between two integers, to float32: either; a thousandth off: one."""
    x = np.array([[2.5, 3.5, 100.0, 127.0]])
    expected = formulas.quantised_token(x, np.array([1.0]))
    for integers, is_right in (([2, 4, 100, 127], True), ([3, 3, 100, 127], True), ([2, 4, 101, 127], False)):
        assert measure(np.array([integers], np.int8), expected).outside.any() != is_right
    off = formulas.quantised_token(x + 1e-3, np.array([1.0]))
    assert measure(np.array([[2, 4, 100, 127]], np.int8), off).outside.any()


def test_infinity_is_right_where_the_exact_value_is_rounded_to_it():
    """Beyond 65,520, the middle between the largest FP16 number and the next that there would be."""
    exact = np.array([65519.0, 65521.0, 1e6, -1e6])
    expected = formulas.total([exact[None], np.zeros((1, 4))])
    right = np.array([[65504.0, np.inf, np.inf, -np.inf]], np.float16)
    found = measure(right, expected)
    assert not found.outside.any()
    assert not found.moved.any()
    assert measure(-right, expected).outside.all()
    assert measure(np.full((1, 4), 65504.0, np.float16), expected).outside.tolist() == [[False, True, True, True]]


def test_a_tie_of_an_exact_sum_goes_to_the_even_number():
    """1 + 2⁻¹¹ lies in the middle; float32 has it, so nothing may lead it to the odd number above."""
    expected = formulas.total([np.ones((1, 2)), np.full((1, 2), 2.0**-11)])
    assert measure(np.array([[1, 1 + 2**-10]], np.float16), expected).outside.tolist() == [[False, True]]
    # 2⁻³⁰ more is no float32 at this size: then a float32 sum may lose it, and either number is right.
    expected = formulas.total([np.ones((1, 2)), np.full((1, 2), 2.0**-11), np.full((1, 2), 2.0**-30)])
    assert not measure(np.array([[1, 1 + 2**-10]], np.float16), expected).outside.any()


def test_weights_of_wrong_experts_are_judged_as_theirs():
    """Only the choice is wrong, and only its token is named."""
    case = case_of("1-moe-float")
    right = layer_twin.layer(case)["expert_index"][9]
    unchosen = next(e for e in range(case.config.n_routed_experts) if e not in right)

    def other(index: np.ndarray) -> np.ndarray:
        index[9, 0] = unchosen
        return index

    verdict = judged(case, layer_twin.layer(case, alter={"expert_index": other}))
    assert [one.stage for one in verdict.wrong] == ["router"]
    assert verdict.wrong[0].where == ("token 9",)
    assert len(verdict.wrong[0].reasons) == 1


def test_a_result_of_another_form_is_refused():
    case = case_of("0-dense-float")
    there = layer_twin.layer(case)
    with pytest.raises(InputError, match=r"missing tensors \['o'\]"):
        judge_layer(case, LayerResult("twin", {name: x for name, x in there.items() if name != "o"}, {}))
    with pytest.raises(InputError, match="'out' is F32"):
        judge_layer(case, LayerResult("twin", there | {"out": there["out"].astype(np.float32)}, {}))
