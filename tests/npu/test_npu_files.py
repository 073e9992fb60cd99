"""Reading believes nothing, writing is whole or not at all, and what cannot be computed is said in one line."""

import json

import numpy as np
import pytest
from npu_strategies import joined, problem, write_case, write_tensors
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from npu_backend.errors import InputError
from npu_backend.files import RankResult, finished, read_case, write_result
from npu_backend.packing import held_rows
from npu_backend.schedule import chunk_count
from npu_backend.shard import check_computable, requests_of, shard

P = problem(0, "normal", (2, 1), (9, 12), 12, is_causal=True, cp=2)


def good(tmp_path, name="case"):
    path = write_case(tmp_path, P, name)
    with safe_open(path, framework="numpy") as file:
        return path, load_file(path), file.metadata()["case"]


def test_a_case_is_read_as_it_was_written(tmp_path):
    case = read_case(good(tmp_path)[0])
    for read, x in zip((case.query, *case.rows), P[:3], strict=True):
        np.testing.assert_array_equal(read, x)
    np.testing.assert_array_equal(case.q_position, P.position)
    np.testing.assert_array_equal(case.kv_segment, P.segment)
    assert (case.scale, case.is_causal, case.cp, case.name) == (P.scale, True, 2, "case")
    check_computable(case)
    assert requests_of(case) == ((3,), ((9, 12),), (0,))


def one_line(call, rule):
    with pytest.raises(InputError, match=rule) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"\xff" * 100, b"[" * 100_000, b'{"a": 1}'])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "case.safetensors"
    path.write_bytes(content)
    one_line(lambda: read_case(path), "is not a whole safetensors file")


def test_missing_file_and_folder_are_refused(tmp_path):
    one_line(lambda: read_case(tmp_path / "no.safetensors"), "does not exist")
    one_line(lambda: read_case(tmp_path), "is no file")


def test_truncated_file_is_refused(tmp_path):
    path = good(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1])
    one_line(lambda: read_case(path), "is not a whole safetensors file")


@pytest.mark.parametrize("name", ["query", "key", "value", "q_position", "kv_segment"])
def test_one_changed_bit_is_refused(tmp_path, name):
    path, tensors, _ = good(tmp_path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors[name].view(np.uint8).reshape(-1)[0] ^= 1
    save_file(tensors, path, metadata)
    one_line(lambda: read_case(path), "digest")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"format": "cpjax.result"}, "'format'"),
        ({"version": "2"}, "'version' is '2'; it must be '1'"),
        ({"name": "other"}, "'name'"),
        ({"digest": "0" * 64}, "digest"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path, change, rule):
    _, tensors, case = good(tmp_path)
    path = write_tensors(tmp_path / "case.safetensors", tensors, case, **change)
    one_line(lambda: read_case(path), rule)


def test_a_file_without_metadata_is_refused(tmp_path):
    path, tensors, _ = good(tmp_path)
    save_file(tensors, path)
    one_line(lambda: read_case(path), "'format' is None")


def test_a_name_that_is_no_name_is_refused(tmp_path):
    path = good(tmp_path, "a case")[0]
    one_line(lambda: read_case(path), "letters, digits")


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("query", lambda x: x.astype(np.float32), "'query' is F32; it must be F16"),
        ("q_position", lambda x: x.astype(np.int64), "'q_position' is I64"),
        ("value", lambda x: x[0], r"must be \[B, S, K, V\]"),
        ("value", lambda x: x[..., :0], "nothing empty"),
        ("key", lambda x: x[..., :100], "H is 192 in 'query' but 100 in 'key'"),
        ("kv_segment", lambda x: x[:, :5], "S is 12"),
        ("q_segment", lambda x: x[:1], "B is 2"),
        ("query", lambda x: None, r"missing tensors \['query'\]"),
        ("more", lambda x: np.zeros(1, np.float16), r"unknown tensors \['more'\]"),
        ("sink", lambda x: np.zeros(2, np.float32), "has tensor 'sink'; no operator is called with one"),
        ("bias", lambda x: np.zeros((1, 1, 12, 12), np.float32), "has tensor 'bias'"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, name, change, rule):
    _, tensors, case = good(tmp_path)
    changed = change(tensors.get(name))
    tensors = {key: x for key, x in (tensors | {name: changed}).items() if x is not None}
    path = write_tensors(tmp_path / "case.safetensors", tensors, case)
    one_line(lambda: read_case(path), rule)


def test_heads_that_cannot_be_shared_are_refused(tmp_path):
    _, tensors, case = good(tmp_path)
    tensors["query"] = np.concatenate([tensors["query"], tensors["query"][:, :, :1]], axis=2)
    tensors |= {name: np.concatenate([tensors[name]] * 2, axis=2) for name in ("key", "value")}
    path = write_tensors(tmp_path / "case.safetensors", tensors, case)
    one_line(lambda: read_case(path), "3 query heads cannot share 2")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", "[" * 100_000, '{"a":' * 100_000])
def test_description_that_is_no_object_is_refused(tmp_path, text):
    _, tensors, _ = good(tmp_path)
    path = write_tensors(tmp_path / "case.safetensors", tensors, text)
    one_line(lambda: read_case(path), "JSON")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("scale", [None, "1", True, float("nan"), float("inf"), 10**400]),
        ("is_causal", [None, 1, "true"]),
        ("cp", [None, 0, -1, 1.0, True, "two"]),
        ("layout", [None, "striped", ["zigzag"]]),
        ("precision", [None, "ring_mla_fp16"]),
    ],
)
def test_wrong_description_is_refused(tmp_path, key, values):
    for value in values:
        path = write_case(tmp_path, P, **{key: value})
        one_line(lambda path=path: read_case(path), f"{key} is .*; it must be")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"window": 9}, "window is 9; no operator"),
        ({"softcap": 30.0}, "softcap is 30.0; no operator"),
        ({"rope": 1}, "'rope', which this version does not know"),
    ],
)
def test_what_would_change_the_numbers_is_never_ignored(tmp_path, more, says):
    one_line(lambda: read_case(write_case(tmp_path, P, **more)), says)


def with_places(tmp_path, change, both=True):
    """The good case with changed positions or segments."""
    _, tensors, case = good(tmp_path)
    for side in ("q", "kv") if both else ("q",):
        change(tensors[f"{side}_position"], tensors[f"{side}_segment"])
    return write_tensors(tmp_path / "case.safetensors", tensors, case)


def test_positions_of_pads_are_free(tmp_path):
    def change(position, segment):
        position[segment < 0] = 7

    check_computable(read_case(with_places(tmp_path, change)))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda position, segment: segment.__setitem__((1, slice(6, 12)), 1), "packs several requests"),
        (lambda position, segment: segment.__setitem__((1, 3), -1), "not at the right end"),
        (lambda position, segment: segment.__setitem__((0, 11), 0), "not at the right end"),
        (lambda position, segment: segment.__setitem__((0, 0), -2), "segment -2"),
        (lambda position, segment: position.__setitem__((0, 0), 1), "are not 0, 1, 2"),
    ],
)
def test_places_that_the_backend_cannot_compute_are_refused(tmp_path, change, rule):
    case = read_case(with_places(tmp_path, change))
    one_line(lambda: check_computable(case), rule)
    case = read_case(with_places(tmp_path, change, both=False))
    one_line(lambda: check_computable(case), "self-attention")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"cp": 5}, "12 tokens are no multiple of 2·cp = 10; pad to 20"),
        ({"cp": 10**9}, "no multiple"),
        ({"scale": 1e6}, "not finite in FP16"),
        ({"precision": {"npu": "flash_fp16"}}, "ring_mla compute in ring_mla_fp16"),
    ],
)
def test_descriptions_that_the_backend_cannot_compute_are_refused(tmp_path, change, rule):
    case = read_case(write_case(tmp_path, P, **change))
    one_line(lambda: check_computable(case), rule)


def test_shapes_that_the_backend_cannot_compute_are_refused(tmp_path):
    case = read_case(good(tmp_path)[0])
    key, value = case.rows
    longer = case._replace(kv_position=np.repeat(case.kv_position, 2, axis=1))
    for changed, rule in (
        (case._replace(rows=(key, value[..., :64])), "npu_ring_mla takes 192 and 128"),
        (case._replace(query=np.repeat(case.query, 100, axis=2)), "at most 128"),
        (longer, "12 queries but 24 keys"),
    ):
        one_line(lambda changed=changed: check_computable(changed), rule)


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_shards_are_the_sequence_and_their_pads_are_zero(tmp_path, cp):
    p = problem(4, "normal", (2, 1), (9, 12), 12, is_causal=True, cp=cp)
    case = read_case(write_case(tmp_path, p))
    rows = np.concatenate([held_rows(rank, cp, (12 // chunk_count(cp),)) for rank in range(cp)])
    assert sorted(rows) == list(range(12))
    shards = [shard(case, rank) for rank in range(cp)]
    for x, parts in zip(p[:3], zip(*((held.query, *held.rows) for held in shards), strict=True), strict=True):
        whole = np.concatenate(parts, axis=1)
        expected = np.where((p.segment == 0)[..., None, None], x, 0)
        np.testing.assert_array_equal(whole, expected[:, rows])
    position = np.concatenate([held.position for held in shards], axis=1)
    np.testing.assert_array_equal(position, p.position[:, rows])


def results():
    shape = (2, 6, 2)
    places = [np.stack([np.r_[0:3, 9:12]] * 2), np.stack([np.r_[3:9]] * 2)]
    return [
        RankResult(
            np.zeros((*shape, 128), np.float16), np.zeros(shape, np.float32), x.astype(np.int32), P.segment[:, x[0]]
        )
        for x in places
    ]


def test_a_result_is_written_as_the_format_says_and_found_again(tmp_path):
    case = read_case(good(tmp_path)[0])
    path = tmp_path / "result.safetensors"
    assert finished(path, case.digest) is None
    write_result(path, case, results(), precision="ring_mla_fp16", order="ring", about={"seconds": 1.5})
    assert finished(path, case.digest) == {"seconds": 1.5}
    joined(path, P)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    expected = {"format": "cpjax.result", "version": "1", "name": "case", "digest": case.digest, "backend": "npu"}
    assert metadata == expected | {"precision": "ring_mla_fp16", "order": "ring", "about": json.dumps({"seconds": 1.5})}
    assert sorted(x.name for x in tmp_path.iterdir()) == ["case.safetensors", "result.safetensors"]


def test_nothing_is_overwritten(tmp_path):
    case = read_case(good(tmp_path)[0])
    path = tmp_path / "result.safetensors"
    options = {"precision": "ring_mla_fp16", "order": "ring", "about": {}}
    write_result(path, case, results(), **options)
    before = path.read_bytes()
    one_line(lambda: write_result(path, case, results(), **options), "is there already")
    other = case._replace(digest="f" * 64)
    one_line(lambda: finished(path, other.digest), r"of digest .* not this case's \(ffffffff")
    one_line(lambda: write_result(path, other, results(), **options), "move it away")
    assert path.read_bytes() == before
    path.write_bytes(before[:-1])
    one_line(lambda: finished(path, case.digest), "no whole result")
    one_line(lambda: finished(tmp_path, case.digest), "no whole result")
