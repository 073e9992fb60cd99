"""A package with backends that does not exist outside of tests: its files and the metadata that pip would write."""

from pathlib import Path

MODULE = '''
import os
import numpy as np
from cpjax.crosscheck.files.result import Result


class Dense:
    """The example of docs/backends.md."""

    def supports(self, case):
        return None if case.layout == "zigzag" else f"layout {case.layout}"

    def run(self, case):
        group = case.query.shape[2] // case.key.shape[2]
        query, key, value = (x.astype(np.float64) for x in (case.query, case.key, case.value))
        score = case.scale * np.einsum("btnh,bsnh->bnts", query, key.repeat(group, axis=2))
        q, kv = case.q_tokens, case.kv_tokens
        seen = (q.segment[:, :, None] == kv.segment[:, None, :]) & (q.segment[:, :, None] >= 0)
        if case.is_causal:
            seen &= q.position[:, :, None] >= kv.position[:, None, :]
        score = np.where(seen[:, None], score, -np.inf)
        top = np.maximum(score.max(axis=3, keepdims=True), -1e300)
        p = np.exp(score - top)
        total = p.sum(axis=3)
        out = np.einsum("bnts,bsnv->btnv", p / np.maximum(total, 1e-300)[..., None], value.repeat(group, axis=2))
        with np.errstate(divide="ignore"):
            lse = (top[..., 0] + np.log(total)).swapaxes(1, 2)
        return Result("", "flash_fp16", "ascending", out.astype(np.float16), lse.astype(np.float32), {"numpy": "any"})


class Unsupported(Dense):
    def supports(self, case):
        return "only on <Tuesdays>"


class Raises(Dense):
    def run(self, case):
        raise RuntimeError("kernel panic\\nsecond line")


class Exits(Dense):
    def run(self, case):
        raise SystemExit(0)


class Dies(Dense):
    def run(self, case):
        os.abort()


class RaisesInSupports(Dense):
    def supports(self, case):
        raise KeyError("x")


class RaisesInPrepare(Dense):
    def prepare(self, cases):
        raise OSError("no device")


class Odd(Dense):
    def supports(self, case):
        return False


class Changed(Dense):
    def run(self, case):
        result = super().run(case)
        return result.__class__(**{**result.__dict__, **self.change(result)})


class NaN(Changed):
    def change(self, result):
        out = result.out.copy()
        out[0, 3, 0, 5] = np.nan
        return {"out": out}


class Shape(Changed):
    def change(self, result):
        return {"out": result.out[:, :-1]}


class Dtype(Changed):
    def change(self, result):
        return {"out": result.out.astype(np.float32)}


class LseShape(Changed):
    def change(self, result):
        return {"lse": result.lse[..., None]}


class Precision(Changed):
    def change(self, result):
        return {"precision": "fp8"}


class About(Changed):
    def change(self, result):
        return {"about": {"x": object()}}


class WithoutLse(Changed):
    def change(self, result):
        return {"lse": None}


class ForgetsAKey(Dense):
    def run(self, case):
        key = case.key.copy()
        key[:, 40] = 0
        return super().run(case.__class__(**{**case.__dict__, "key": key}))


class Nothing(Dense):
    def run(self, case):
        return None


class NoBackend:
    pass
'''
FAIL = ("NaN", "ForgetsAKey")
ERROR = ("Raises", "Exits", "Dies", "RaisesInSupports", "RaisesInPrepare", "Odd", "Shape", "Dtype", "LseShape",
         "Precision", "About", "Nothing", "NoBackend", "Missing")  # fmt: skip
PASS = ("Dense", "WithoutLse")


def install(folder: Path) -> Path:
    """Write the package into `folder`; on the path of Python it is installed."""
    (folder / "their_backends.py").write_text(MODULE)
    info = folder / "their_backends-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-backends\nVersion: 1.0\n")
    lines = [f"{name.lower()} = their_backends:{name}" for name in (*PASS, "Unsupported", *FAIL, *ERROR)]
    (info / "entry_points.txt").write_text("\n".join(["[cpjax.backends]", *lines, ""]))
    return folder
