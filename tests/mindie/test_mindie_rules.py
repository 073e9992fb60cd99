"""Each rule is broken by one config and kept by another; what is broken together is found together, and no more."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindie_build import OPTIONS, build, plugins
from mindie_cases import CASES, compatible
from mindie_startup_cases import RANGES

from cpjax.errors import InputError
from cpjax.mindie.check import Checked, check_files
from cpjax.mindie.rules import PAIRS, RULES

EXAMPLES = Path(__file__).parents[2] / "examples"
LEVELS = {rule.name: rule.level for rule in RULES}


def checked(folder: Path, changes: Mapping) -> Checked:
    document, options = build(changes)
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return check_files([path], **options)[0]


def names(one: Checked) -> set[str]:
    return {finding.rule for finding in one.findings}


def test_every_rule_has_a_case_and_a_name_of_its_own():
    assert [rule.name for rule in RULES if rule.name not in CASES] == []
    assert len({rule.name for rule in (*RULES, *PAIRS)}) == len(RULES) + len(PAIRS)
    assert CASES.keys() == LEVELS.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_failing_config_breaks_the_rule_and_what_it_implies(tmp_path, name):
    one = checked(tmp_path, CASES[name].breaks)
    assert names(one) == {name, *CASES[name].with_}
    (finding,) = (finding for finding in one.findings if finding.rule == name)
    assert finding.path.startswith("$.")
    assert all(part and part.isprintable() for part in (finding.found, finding.says, finding.fix, finding.source))


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_passing_config_keeps_all_rules(tmp_path, name):
    one = checked(tmp_path, CASES[name].keeps)
    assert name not in names(one)
    assert one.of("error") == []


@pytest.mark.parametrize("name", RANGES)
def test_a_range_has_two_ends(tmp_path, name):
    low, high, more = RANGES[name]
    rule = f"{name.rpartition('.')[2]}-range"
    for number, is_broken in ((low, False), (high, False), (high + 1, True), (low - 1, True)):
        if number >= 0:  # no field of these can be read below 0
            assert (rule in names(checked(tmp_path, {name: number} | more))) == is_broken, number


@st.composite
def independent_cases(draw) -> list[str]:
    """Rules that look at different things, so that their configs can be put together."""
    chosen: list[str] = []
    for name in draw(st.lists(st.sampled_from(sorted(CASES)), min_size=2, max_size=40, unique=True)):
        if compatible([*chosen, name]):
            chosen.append(name)
    return chosen


@given(independent_cases())
def test_broken_together_they_are_found_with_what_they_imply_and_nothing_else(tmp_path_factory, chosen):
    changes: dict = {}
    for name in chosen:
        changes |= CASES[name].breaks
    one = checked(tmp_path_factory.mktemp("rules"), changes)
    assert names(one) == {*chosen, *(implied for name in chosen for implied in CASES[name].with_)}
    levels = [finding.level for finding in one.findings]
    assert levels == sorted(levels)
    assert levels == [LEVELS[finding.rule] for finding in one.findings]


def test_the_vendors_example_is_accepted_whole_as_object_and_as_fragment(tmp_path):
    whole = json.loads((EXAMPLES / "deepseek-r1-cp2.json").read_text())
    deploy = whole["BackendConfig"]["ModelDeployConfig"]
    texts = [
        json.dumps(whole),
        json.dumps({"ModelDeployConfig": deploy}),
        f'"ModelDeployConfig" : {json.dumps(deploy)}',
    ]
    for text in texts:
        path = tmp_path / "config.json"
        path.write_text(text)
        for dtype, warnings in ((None, {"dtype-known"}), ("float16", set())):
            assert names(check_files([path], dtype=dtype, hardware="800i-a3")[0]) == warnings


def test_the_example_pair_is_accepted():
    pair = [EXAMPLES / "prefill-cp2.json", EXAMPLES / "decode.json"]
    for one in check_files(pair, roles=("prefill", "decode"), dtype="float16", hardware="800i-a3"):
        assert one.findings == ()
        assert one.notes == ()


def test_several_violations_at_once(tmp_path):
    """The vendor's rules, broken as in a hasty edit: all are named, not only the first."""
    changes = {"dp": 2, "sp": 4, "moe_ep": 8, **plugins("mtp,prefix_cache", 3)}
    assert names(checked(tmp_path, changes)) == {
        "cp-without-dp", "world-product", "sp-is-tp", "cp-sp-is-tp", "moe-product", "hybrid-mtp-is-1",
        "mtp-tokens-documented", "prefix-cache-needs-nz", "prefix-cache-with-dp",
    }  # fmt: skip


def pair(folder: Path, first: dict, second: dict, roles: tuple[str, ...] = ("prefill", "decode")) -> set[str]:
    paths = []
    for number, changes in enumerate((first, second)):
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(json.dumps(build(changes)[0]))
    one, two = check_files(paths, roles=roles, **OPTIONS)
    assert names(one) <= {rule.name for rule in RULES}
    return names(two) & {rule.name for rule in PAIRS}


DECODE = {"cp": 1, "dp": 2, "sp": 1}
PAIR_CASES = {
    "pair-tp-divides": ({"cp": 1, "sp": 1, "tp": 6}, {"cp": 1, "sp": 1, "tp": 4}),
    "pair-same-model": ({}, DECODE | {"modelName": "DeepSeek-V3_w4a8"}),
    "pair-same-block": ({}, DECODE | {"Schedule.cacheBlockSize": 64}),
    "pair-both-mtp": (plugins("mtp", 1), DECODE),
}


@pytest.mark.parametrize("name", PAIR_CASES)
def test_rules_between_two_configs(tmp_path, name):
    prefill, decode = PAIR_CASES[name]
    assert pair(tmp_path, prefill, decode) == {name}
    assert pair(tmp_path, decode, prefill, ("decode", "prefill")) == {name}
    assert pair(tmp_path, {}, DECODE) == set()


def test_instances_of_one_role_must_be_alike(tmp_path):
    assert pair(tmp_path, DECODE, DECODE | {"tp": 4, "dp": 4}, ("decode", "decode")) == {"pair-same-sizes"}
    assert pair(tmp_path, DECODE, DECODE, ("decode", "decode")) == set()


def test_the_weights_own_config_says_dtype_and_quantisation(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()

    def found(content: str | None, name: str = "DeepSeek-R1") -> tuple[set[str], int]:
        (weights / "config.json").write_text(content or "") if content is not None else None
        one = checked(tmp_path, {"modelWeightPath": str(weights), "modelName": name, "--dtype": None})
        return names(one), len(one.notes)

    assert found(None) == ({"dtype-known", "quantisation-known"}, 1)
    assert found('{"torch_dtype": "float16", "quantize": "w8a8_dynamic"}') == (set(), 0)
    assert found('{"torch_dtype": "bfloat16", "quantize": "w8a8"}') == ({"fp16-only"}, 0)
    assert found('{"torch_dtype": "float16", "quantize": "w8a16"}') == ({"model-supported"}, 0)
    assert found('{"dtype": "float16", "quantize": "w4a8"}') == ({"w4a8-disputed"}, 0)
    assert found('{"torch_dtype": "int7"}', "DeepSeek-R1_w8a8") == ({"dtype-known"}, 1)
    for unreadable in ("", "[]", "{", "[" * 1000, '{"a": NaN}'):
        assert found(unreadable, "DeepSeek-R1_w8a8") == ({"dtype-known"}, 1)


def test_what_an_older_documentation_says(tmp_path):
    """2.1.RC1 lists DeepSeek-R1 W8A8 only, and does not yet say that CP needs SP."""
    assert names(checked(tmp_path, {"modelName": "ds_v3_w4a8", "--version": "2.1.RC1"})) == {"model-supported"}
    assert names(checked(tmp_path, {"sp": 1, "--version": "2.1.RC1"})) == set()
    assert names(checked(tmp_path, {"sp": 1, "--version": "2.3.0"})) == {"cp-needs-sp", "cp-sp-is-tp"}


def test_arguments_that_are_not_understood(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(build({})[0]))
    for arguments, message in [
        ({"roles": ["master"]}, 'role "master" is not known'),
        ({"roles": ["prefill", "decode"]}, "1 config and 2 roles"),
        ({"version": "9.9"}, 'mindie-version "9.9" is not known; known are 1.0.RC1, 1.0.RC2, 1.0.RC3, '),
        ({"dtype": "int3"}, 'dtype "int3" is not known'),
        ({"nodes": 0}, "nodes is 0"),
    ]:
        with pytest.raises(InputError, match=message):
            check_files([path], **arguments)
    with pytest.raises(InputError, match="2 configs and 0 roles"):
        check_files([path, path])


def test_nodes_and_cards(tmp_path):
    """worldSize is one node's cards where npuDeviceIds is as long, and all cards where it is shorter."""
    node = {"Backend.multiNodesInferEnabled": True, "Backend.npuDeviceIds": [list(range(8))]}
    for changes in (node | {"worldSize": 8}, node, node | {"worldSize": 8, "--nodes": 2}):
        deployment = checked(tmp_path, changes).setting.deployment
        assert (deployment.nodes, deployment.world_size) == (2, 16)
    assert names(checked(tmp_path, node | {"worldSize": 8, "--nodes": 3})) >= {"world-product", "moe-product"}
