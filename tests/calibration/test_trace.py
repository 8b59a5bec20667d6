import contextlib
import itertools
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_calibration.trace import About, Trace
from offramp_calibration.trace_writer import writing
from offramp_contract.errors import BrokenTrace
from offramp_contract.native import NativeRule
from offramp_runtime import open_bundle

DIGEST = "0" * 64
RULE = NativeRule(
    threshold=0.8, above=True, is_strict=True, precision="float32", is_knob=True, sources=("net.py:3 (if c > 0.8:)",)
)
ABOUT = About("model", DIGEST, DIGEST, (0.5, 1.0))


def small(num_samples=6, num_classes=3, num_exits=2, seed=0):
    rng = np.random.default_rng(seed)
    depths = tuple(((np.arange(num_exits) + 1) / num_exits).tolist())
    logits = tuple(rng.normal(size=(num_samples, num_classes)).astype(np.float32) for _ in range(num_exits))
    return Trace(About("model", DIGEST, DIGEST, depths), rng.integers(num_classes, size=num_samples), logits)


def write(trace, path):
    with writing(path) as writer:
        writer.append(trace.label_N, trace.logits_ENC)
        writer.finish(trace.about)


def same(one, other):
    return (
        one.about == other.about
        and np.array_equal(one.label_N, other.label_N)
        and all(np.array_equal(a, b) for a, b in zip(one.logits_ENC, other.logits_ENC, strict=True))
    )


@settings(deadline=None, max_examples=40)
@given(
    num_samples=st.integers(1, 40),
    num_classes=st.integers(2, 9),
    num_exits=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 40), max_size=5),
)
def test_a_trace_reads_back_as_it_was_written_however_it_was_cut_into_batches(
    tmp_path_factory, num_samples, num_classes, num_exits, cuts
):
    trace = small(num_samples, num_classes, num_exits)
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    edges = [0, *sorted(min(cut, num_samples) for cut in cuts), num_samples]
    with writing(path) as writer:
        for start, end in itertools.pairwise(edges):
            writer.append(trace.label_N[start:end], [logits[start:end] for logits in trace.logits_ENC])
        writer.finish(trace.about)
    assert same(Trace.read(path), trace)
    assert [file.name for file in path.parent.iterdir()] == ["t.npz"]


def test_numpy_reads_a_trace_without_us(tmp_path):
    trace = small()
    write(trace, tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as arrays:
        assert set(arrays) == {"about", "label", "logits_0", "logits_1"}
        np.testing.assert_array_equal(arrays["logits_1"], trace.logits_ENC[1])
        assert json.loads(arrays["about"].tobytes())["model"] == "model"


def test_a_trace_is_mapped_and_not_read(tmp_path):
    write(small(), tmp_path / "t.npz")
    assert all(isinstance(logits_NC, np.memmap) for logits_NC in Trace.read(tmp_path / "t.npz").logits_ENC)


def test_batches_that_do_not_join_leave_the_old_trace_and_nothing_else(tmp_path):
    path, old = tmp_path / "t.npz", small(seed=1)
    write(old, path)
    with pytest.raises(BrokenTrace, match="logits_0: rows of shape"):
        append_both(path, small(), small(num_classes=4))
    assert same(Trace.read(path), old)
    assert list(tmp_path.iterdir()) == [path]


def append_both(path, *traces):
    with writing(path) as writer:
        for trace in traces:
            writer.append(trace.label_N, trace.logits_ENC)
        writer.finish(traces[0].about)


def write_npz(path, compress=zipfile.ZIP_STORED, **arrays):
    """Write an `.npz` of arrays, or of members given as bytes."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                if isinstance(array, bytes):
                    member.write(array)
                else:
                    np.lib.format.write_array(member, array)


def parts(**changed):
    trace = small()
    about = np.frombuffer(ABOUT.to_json(), np.uint8)
    arrays = {"about": about, "label": trace.label_N, "logits_0": trace.logits_ENC[0], "logits_1": trace.logits_ENC[1]}
    return {name: array for name, array in (arrays | changed).items() if array is not None}


def about(**changed):
    return np.frombuffer(json.dumps(json.loads(ABOUT.to_json()) | changed).encode(), np.uint8)


def array_claiming(header, data=b""):
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': %s}"


def test_the_parts_of_a_sound_trace_are_read(tmp_path):
    write_npz(tmp_path / "t.npz", **parts())
    assert same(Trace.read(tmp_path / "t.npz"), small())


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"about": None}, "does not say which bundle"),
        ({"about": about(format_version=4)}, "format 4 is not known"),
        ({"about": about(format_version=2)}, "does not say which bundle"),
        ({"about": about(depth_E=[0.7, 0.5])}, "do not rise"),
        ({"about": about(depth_E=[])}, "do not rise"),
        ({"about": about(depth_E=[float("nan"), 1.0])}, "do not rise"),
        ({"about": about(depth_E=[10**400, 1])}, "does not say which bundle"),
        ({"about": about(depth_E=None)}, "does not say which bundle"),
        ({"about": about(model=["m"])}, "does not say which bundle"),
        ({"about": about(data_digest="zz")}, "does not say which bundle"),
        ({"about": about(more="x")}, "does not say which bundle"),
        ({"about": np.frombuffer(b"[" * 100_000, np.uint8)}, "does not say which bundle"),
        ({"about": np.zeros(2**20 + 1, np.uint8)}, "does not say which bundle"),
        ({"label": None}, "holds no label"),
        ({"logits_1": None}, "holds no logits_1"),
        ({"label": np.zeros((6, 1), np.int64)}, "labels must be int64"),
        ({"label": np.zeros(6, np.int32)}, "labels must be int64"),
        ({"label": np.zeros(0, np.int64)}, "labels must be int64"),
        ({"label": np.array([0, 1, 2, 3, 0, 1])}, "3 classes that its exits tell apart"),
        ({"label": np.array([0, 1, 2, -1, 0, 1])}, "3 classes that its exits tell apart"),
        ({"logits_0": np.zeros((5, 3), np.float32)}, "logits_0 must be float32, one row a sample"),
        ({"logits_0": np.zeros((6, 3))}, "logits_0 must be float32"),
        ({"logits_0": np.zeros((6, 3), ">f4")}, "logits_0 must be float32"),
        ({"logits_0": np.zeros(6, np.float32)}, "logits_0 must be float32"),
        ({"logits_0": np.asfortranarray(np.zeros((6, 3), np.float32))}, "Fortran order"),
        ({"logits_0": array_claiming(PLAIN % "(6, 3)", b"\0" * 71)}, "claims 72 bytes in its header and holds 71"),
        ({"logits_0": array_claiming(PLAIN % "(1099511627776, 1099511627776)")}, "claims"),
        ({"logits_0": array_claiming(PLAIN % "(-6, -3)", b"\0" * 72)}, "claims"),
        ({"logits_0": array_claiming(PLAIN % "(6, 3)" + " " * 60_000, b"\0" * 72)}, "not one that numpy writes"),
        ({"logits_0": array_claiming("{" * 3_000)}, "not one that numpy writes"),
        ({"logits_0": array_claiming("__import__('os').abort()")}, "not one that numpy writes"),
        ({"logits_0": b"\x93NUMPY\x02\x00\xff\xff\xff\xff"}, "not one that numpy writes"),
        ({"logits_0": b""}, "not one that numpy writes"),
    ],
)
def test_what_record_did_not_write_is_refused_in_words(tmp_path, changed, sentence):
    write_npz(tmp_path / "t.npz", **parts(**changed))
    with pytest.raises(BrokenTrace, match=r".") as refused:
        Trace.read(tmp_path / "t.npz")
    assert sentence in refused.value.message


def native(**changed):
    """Give the parts of a trace of a network that leaves by a rule of its own at its first exit."""
    about = About("model", DIGEST, DIGEST, (0.5, 1.0), (RULE,))
    scores = np.array([0.1, 0.9, -np.inf, np.inf, 0.8, 0.5], np.float32)
    return parts(**{"about": np.frombuffer(about.to_json(), np.uint8), "native_0": scores} | changed)


def test_what_a_networks_own_rules_compare_is_read_back(tmp_path):
    trace, scores = small(), native()["native_0"]
    with writing(tmp_path / "t.npz") as writer:
        for rows in (slice(0, 4), slice(4, 6)):
            writer.append(trace.label_N[rows], [logits[rows] for logits in trace.logits_ENC], [scores[rows]])
        writer.finish(About("model", DIGEST, DIGEST, (0.5, 1.0), (RULE,)))

    read = Trace.read(tmp_path / "t.npz")

    assert read.about.native_K == (RULE,)
    assert json.loads(read.about.to_json())["format_version"] == 2
    np.testing.assert_array_equal(read.native_KN, [scores])
    assert isinstance(read.native_KN[0], np.memmap)


def test_a_trace_without_them_is_the_one_that_has_always_been_written():
    assert json.loads(ABOUT.to_json()) == {
        "format_version": 1,
        "model": "model",
        "model_digest": DIGEST,
        "data_digest": DIGEST,
        "depth_E": [0.5, 1.0],
    }


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"native_0": None}, "holds no native_0"),
        ({"native_0": np.zeros(5, np.float32)}, "native_0 must be float32, one number a sample"),
        ({"native_0": np.zeros((6, 1), np.float32)}, "native_0 must be float32"),
        ({"native_0": np.zeros(6)}, "native_0 must be float32"),
        ({"native_0": np.full(6, np.nan, np.float32)}, "native_0 must be float32"),
        ({"about": about(format_version=2, native_K=[RULE.model_dump()] * 2)}, "exit rules are not one for every exit"),
        ({"about": about(format_version=2, native_K=[{"threshold": 1}])}, "does not say which bundle"),
        ({"about": about(format_version=2, native_K=7)}, "does not say which bundle"),
        ({"about": about(native_K=[RULE.model_dump()])}, "does not say which bundle"),
    ],
)
def test_native_scores_that_record_did_not_write_are_refused_in_words(tmp_path, changed, sentence):
    write_npz(tmp_path / "t.npz", **native(**changed))
    with pytest.raises(BrokenTrace, match=r".") as refused:
        Trace.read(tmp_path / "t.npz")
    assert sentence in refused.value.message


class Bomb:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_nothing_is_unpickled(tmp_path):
    pickled = array_claiming(
        "{'descr': '|O', 'fortran_order': False, 'shape': (6,)}", pickle.dumps(Bomb(tmp_path / "m"))
    )
    write_npz(tmp_path / "t.npz", **parts(label=pickled))
    with pytest.raises(BrokenTrace, match="objects are never read"):
        Trace.read(tmp_path / "t.npz")
    assert not (tmp_path / "m").exists()


def test_a_compressed_trace_is_refused(tmp_path):
    write_npz(tmp_path / "t.npz", zipfile.ZIP_DEFLATED, **parts())
    with pytest.raises(BrokenTrace, match="compressed"):
        Trace.read(tmp_path / "t.npz")


def test_a_trace_cut_short_anywhere_or_of_garbage_is_refused(tmp_path):
    path = tmp_path / "t.npz"
    write(small(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenTrace):
            Trace.read(path)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_flipped_bytes_are_refused_or_give_a_trace_but_never_another_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flipped") / "t.npz"
    write(small(), path)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(BrokenTrace):
        assert len(Trace.read(path)) >= 1


def test_a_trace_is_held_against_the_bundle_it_is_used_with(tmp_path, exported, toy_bundle):
    manifest = open_bundle(exported).manifest
    logits = [np.zeros((6, 5), np.float32) for _ in range(4)]

    def made(digest=manifest.model_digest, depths=manifest.exit_depths, logits=logits):
        return Trace(About("residual", digest, DIGEST, depths), np.zeros(6, np.int64), tuple(logits))

    made().check_made_for(manifest)
    with pytest.raises(BrokenTrace, match="another model than this bundle's, 'residual'"):
        made().check_made_for(open_bundle(toy_bundle).manifest)
    with pytest.raises(BrokenTrace, match="exits are not this bundle's"):
        made(depths=(0.1, 0.2, 0.3, 1.0)).check_made_for(manifest)
    with pytest.raises(BrokenTrace, match="exits are not this bundle's"):
        made(logits=[np.zeros((6, 4), np.float32)] * 4).check_made_for(manifest)
    with pytest.raises(BrokenTrace, match="logits_2 are not all finite"):
        made(logits=[*logits[:2], np.full((6, 5), np.nan, np.float32), logits[3]]).check_made_for(manifest)
