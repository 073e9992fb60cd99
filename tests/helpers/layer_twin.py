"""A decoder layer once more, in NumPy float32 with one rounding at each tensor; imports nothing of cpjax.

`layer(case, fault)` computes every tensor of a result in order, each from those before it. A fault is switched on by
its name, in `FAULTS`; or `alter` changes tensors as they are stored, so that all that follows is computed from them.
"""

import math
from collections.abc import Callable

import numpy as np

f32, f16 = np.float32, np.float16

FAULTS = {
    "eps of the config": ("q_a_norm", "eps 1e-05, the config's rms_norm_eps"),
    "eps of the config in c_kv": ("c_kv", "eps 1e-05, the config's rms_norm_eps"),
    "eps 1e-6": ("input_norm", "eps 1e-06 in place of 1e-05"),
    "weight of the norm": ("post_norm", "the norm's weight forgotten"),
    "rope halves": ("query", "pairs (i, i + R/2) are rotated"),
    "rope halves of the key": ("k_rope", "pairs (i, i + R/2) are rotated"),
    "pairs left": ("query", "pairs left side by side"),
    "plain frequencies": ("query", "plain frequencies, without YaRN"),
    "positions": ("k_rope", "positions one too large"),
    "mscale": ("attention", "the scale lacks YaRN's factor mscale²"),
    "key value apart": ("key_value", "kv_b_proj read as the keys of all heads"),
    "gate and up": ("activated", "gate and up exchanged"),
    "gate and up of the product": ("gate_up", "gate and up exchanged"),
    "silu rounded": ("activated", "silu rounded to FP16"),
    "residual": ("attended", "the residual (hidden) forgotten"),
    "second residual": ("out", "the residual (attended) forgotten"),
    "first residual again": ("out", "(hidden) added in place of attended"),
}
FAULTS_OF_EXPERTS = {
    "gate and up of experts": ("expert_activated", "gate and up exchanged"),
    "next expert": ("expert_down", "the weights of the next expert"),
    "router in fp16": ("router_logits", "the router's weights rounded to FP16"),
    "router in hf32": ("router_logits", "19 bits"),
    "bias weighs": ("router", "the correction bias is in the experts' weights"),
    "bias forgotten": ("router", "the correction bias forgotten"),
    "softmax": ("router", "softmax in place of sigmoid"),
    "not renormalised": ("router", "weights not renormalised"),
    "not scaled": ("router", "routed_scaling_factor (2.5) forgotten"),
    "groups": ("router", "groups of experts ignored"),
    "weights in fp16": ("routed", "the experts' weights rounded to FP16"),
    "shared forgotten": ("out", "shared_down forgotten"),
    "two roundings": ("out", "routed + shared_down rounded to FP16"),
}
FAULTS_OF_STATIC = {
    "quant_bias forgotten": ("kv_a", "quant_bias forgotten"),
    "quant_bias twice": ("o", "quant_bias added twice"),
    "offset": ("q_a.integers", "input_offset forgotten"),
    "reciprocal": ("q_a.integers", "1 / input_scale rounded to FP16"),
    "truncated": ("q.integers", "truncated toward zero"),
}
FAULTS_OF_DYNAMIC = {
    "token scale": ("down", "the scale of each token forgotten"),
    "128": ("down.integers", "max |x| / 128"),
    "one scale": ("down.integers", "one scale for all tokens"),
}
FAULTS_OF_W4A8 = {
    "nibbles": ("expert_down", "nibbles exchanged"),
    "scale_bias": ("expert_gate_up", "scale_bias forgotten"),
}
FAULTS_OF_GROUPS = {"second scale": ("expert_gate_up", "weight_scale_second forgotten")}

Alter = dict[str, Callable[[np.ndarray], np.ndarray]]


class Twin:
    """The layer of one case."""

    def __init__(self, case, fault: str = "", alter: Alter | None = None, *, is_vendor: bool = False):
        self.case, self.fault, self.alter = case, fault, alter or {}
        self.config, self.w = case.config, case.tensors
        self.is_vendor = is_vendor
        self.out: dict[str, np.ndarray] = {}

    def keep(self, name: str, x: np.ndarray, dtype=f16) -> np.ndarray:
        x = np.asarray(x).astype(dtype)
        if name in self.alter:
            x = self.alter[name](x.copy()).astype(dtype)
        self.out[name] = x
        return x

    def norm(self, name: str, x: np.ndarray, weight: str, eps: float) -> np.ndarray:
        x = x.astype(f32)
        y = x / np.sqrt((x * x).mean(axis=1, keepdims=True, dtype=f32) + f32(eps))
        if self.is_vendor:
            y = y.astype(f16).astype(f32)
        gamma = self.w[f"{weight}.weight"].astype(f32)
        if self.fault == "weight of the norm" and name == "post_norm":
            gamma = np.ones_like(gamma)
        return self.keep(name, y * gamma)

    def weights(self, name: str) -> list[str]:
        one = {"q_a": ["q_a_proj"], "q": ["q_b_proj" if self.config.q_lora_rank else "q_proj"]}
        one |= {"kv_a": ["kv_a_proj_with_mqa"], "o": ["o_proj"]}
        if name in one:
            return [f"self_attn.{x}" for x in one[name]]
        where = {"": "mlp.", "shared_": "mlp.shared_experts.", "expert_": "mlp.experts.{e}."}
        prefix = name.removesuffix("gate_up").removesuffix("down")
        last = ["gate_proj", "up_proj"] if name.endswith("gate_up") else ["down_proj"]
        if self.fault == "gate and up of the product" and name == "gate_up":
            last = last[::-1]
        return [where[prefix] + x for x in last]

    def kind(self, name: str) -> str:
        return self.case.kinds[self.weights(name)[0].format(e=0)]

    def product(self, name: str, x: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
        flat = x.reshape(len(x), -1)
        if self.kind(name) == "FLOAT":
            y = [flat.astype(f32) @ self.w[f"{w}.weight"].astype(f32).T for w in self.weights(name)]
        else:
            a, s = self.integers(name, flat)
            y = [self.times(name, w, a, s) for w in self.weights(name)]
        y = np.concatenate(y, axis=-1)
        return self.keep(name, y if shape is None else y.reshape(shape))

    def integers(self, name: str, x: np.ndarray):
        x, where = x.astype(f32), f"{name}.integers"
        if self.kind(name) == "W8A8":
            first = self.weights(name)[0]
            scale, offset = self.w[f"{first}.input_scale"][0], self.w[f"{first}.input_offset"][0]
            if self.fault == "reciprocal" and name == "q_a":
                x = x * f32(f16(1 / scale)) + offset
            else:
                x = x / scale + (f32(0) if self.fault == "offset" and name == "q_a" else offset)
            x = np.trunc(x) if self.fault == "truncated" and name == "q" else np.rint(x)
            return self.keep(where, np.clip(x, -128, 127), np.int8), None
        s = np.abs(x).max(axis=-1) / f32(128 if self.fault == "128" and name == "down" else 127)
        if self.fault == "one scale" and name == "down":
            s = np.full_like(s, s.max())
        s = self.keep(f"{name}.token_scale", s, f32)
        return self.keep(where, np.clip(np.rint(x / s[..., None]), -128, 127), np.int8), s

    def times(self, name: str, weight: str, a: np.ndarray, s) -> np.ndarray:
        w = self.w[f"{weight}.weight"].astype(np.int64)
        is_vendor = self.case.arithmetic == "vendor"
        cut = (lambda x: (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(f32)) if is_vendor else lambda x: x
        a = a.astype(np.int64)
        if s is None:
            deq = self.w[f"{weight}.deq_scale"]
            deq = (deq & 0xFFFFFFFF).astype(np.uint32).view(f32) if deq.dtype == np.int64 else deq
            bias = self.w[f"{weight}.quant_bias"].astype(np.int64)
            bias = bias * {("quant_bias forgotten", "kv_a"): 0, ("quant_bias twice", "o"): 2}.get((self.fault, name), 1)
            return (a @ w.T + bias).astype(f32) * cut(deq)
        scale = self.w[f"{weight}.weight_scale"][:, 0]
        by = np.ones_like(s) if self.fault == "token scale" and name == "down" else s
        if self.case.kinds[weight] == "W8A8_DYNAMIC":
            return (a @ w.T).astype(f32) * scale * by[..., None]
        rows = np.empty((2 * len(w), w.shape[1]), np.int64)
        for i, byte in enumerate(w):
            low, high = byte & 15, (byte >> 4) & 15
            pair = [np.where(x > 7, x - 16, x) for x in (low, high)]
            rows[2 * i : 2 * i + 2] = pair[::-1] if self.fault == "nibbles" and name == "expert_down" else pair
        second = self.w.get(f"{weight}.weight_scale_second")
        if second is None or (self.fault == "second scale" and name == "expert_gate_up"):
            second = np.ones((len(scale), 1), f32)
        width = rows.shape[1] // second.shape[1]
        groups = [(slice(g * width, (g + 1) * width), cut(scale * second[:, g])) for g in range(second.shape[1])]
        if not is_vendor:
            return sum((a[..., at] @ rows[:, at].T).astype(f32) * by_row for at, by_row in groups) * by[..., None]

        def half(x: np.ndarray) -> np.ndarray:
            total = None
            for at, by_row in groups:
                part = ((x[..., at] @ rows[:, at].T).astype(f32) * by_row).astype(f16)
                total = part if total is None else (total.astype(f32) + part.astype(f32)).astype(f16)
            return total.astype(f32)

        high = a >> 4
        y = f32(16) * half(high) + half((a & 15) - 8)
        if not (self.fault == "scale_bias" and name == "expert_gate_up"):
            y = y + self.w[f"{weight}.scale_bias"].sum(axis=1, dtype=f32)
        return y * by[..., None]

    def rotate(self, name: str, x: np.ndarray) -> np.ndarray:
        config, yarn, r = self.config, self.config.yarn, self.config.qk_rope_head_dim
        omega = []
        for i in range(r // 2):
            plain = config.rope_theta ** (-2 * i / r)
            if yarn is None or (self.fault == "plain frequencies" and name == "query"):
                omega.append(plain)
                continue
            ends = [
                r
                * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
                / (2 * math.log(config.rope_theta))
                for turns in (yarn.beta_fast, yarn.beta_slow)
            ]
            low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), r - 1)
            slow = min(max((i - low) / (high - low), 0.0), 1.0)
            omega.append(plain * (1 - slow) + plain / yarn.factor * slow)
        position = self.w["position"].astype(f32) + f32(self.fault == "positions" and name == "k_rope")
        angle = position[:, None] * np.array(omega, f32)
        angle = angle.reshape((len(x),) + (1,) * (x.ndim - 2) + (-1,))
        cos, sin = np.cos(angle), np.sin(angle)
        if self.is_vendor:
            cos, sin = cos.astype(f16).astype(f32), sin.astype(f16).astype(f32)
        x = x.astype(f32)
        is_halves = (self.fault, name) in (("rope halves", "query"), ("rope halves of the key", "k_rope"))
        a, b = np.split(x, 2, axis=-1) if is_halves else (x[..., 0::2], x[..., 1::2])
        both = a * cos - b * sin, b * cos + a * sin
        if self.fault == "pairs left" and name == "query":
            return np.stack(both, axis=-1).reshape(x.shape)
        return np.concatenate(both, axis=-1)

    def attend(self, query, key, value) -> None:
        """npu_ring_mla's precision: scores in FP16, one tile."""
        config = self.config
        scale = config.softmax_scale
        if self.fault == "mscale":
            scale = config.head_dim**-0.5
        score = np.einsum("tnd,snd->nts", query.astype(f32), key.astype(f32)).astype(f16)
        score = (score.astype(f32) * f32(f16(scale))).astype(f16)
        seen = np.tri(len(query), dtype=bool)
        score = np.where(seen, score.astype(f32), f32(-np.inf))
        top = score.max(axis=2, keepdims=True)
        p = np.exp((score - top).astype(f16).astype(f32))
        total = p.sum(axis=2, dtype=f32)
        out = np.einsum("nts,snv->tnv", p.astype(f16).astype(f32), value.astype(f32)) / total.T[..., None]
        self.keep("attention", out)
        self.keep("lse", (top[..., 0] + np.log(total)).T, f32)

    def activate(self, name: str, x: np.ndarray) -> np.ndarray:
        gate, up = np.split(x.astype(f32), 2, axis=-1)
        if (self.fault, name) in (("gate and up", "activated"), ("gate and up of experts", "expert_activated")):
            gate, up = up, gate
        silu = gate / (f32(1) + np.exp(-gate))
        if self.fault == "silu rounded" and name == "activated":
            silu = silu.astype(f16).astype(f32)
        return self.keep(name, silu * up)

    def mlp(self, prefix: str, x: np.ndarray) -> np.ndarray:
        x = self.product(f"{prefix}gate_up", x)
        return self.product(f"{prefix}down", self.activate(f"{prefix}activated", x))

    def route(self, x: np.ndarray):
        config, weight = self.config, self.w["mlp.gate.weight"]
        if self.fault == "router in fp16":
            weight = weight.astype(f16).astype(f32)
        if self.fault == "router in hf32":
            weight = (weight.view(np.uint32) & np.uint32(0xFFFFE000)).view(f32)
        logits = self.keep("router_logits", x.astype(f32) @ weight.T, f32)
        score = f32(1) / (f32(1) + np.exp(-logits))
        if self.fault == "softmax":
            score = np.exp(logits - logits.max(axis=1, keepdims=True))
            score = score / score.sum(axis=1, keepdims=True)
        bias = self.w["mlp.gate.e_score_correction_bias"]
        choice = score + (f32(0) if self.fault == "bias forgotten" else bias)
        groups = config.n_group or 1
        index = np.empty((len(x), config.num_experts_per_tok), np.int32)
        for t, row in enumerate(choice):
            each = row.reshape(groups, -1)
            best = [sorted(group)[-1] + sorted(group)[-2] for group in each]
            chosen = sorted(range(groups), key=lambda g: -best[g])[: config.topk_group or groups]
            allowed = [e for e in range(len(row)) if e // each.shape[1] in chosen or self.fault == "groups"]
            index[t] = sorted(allowed, key=lambda e: -row[e])[: index.shape[1]]
        index = self.keep("expert_index", index, np.int32)
        weigh = np.take_along_axis(score + bias if self.fault == "bias weighs" else score, index, axis=1)
        if config.norm_topk_prob and self.fault != "not renormalised":
            weigh = weigh / weigh.sum(axis=1, keepdims=True, dtype=f32)
        if self.fault != "not scaled":
            weigh = weigh * f32(config.routed_scaling_factor)
        return index, self.keep("expert_weight", weigh, f32)

    def expert_product(self, name: str, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """x: of each token, or of each token and slot."""
        is_float = self.kind(name) == "FLOAT"
        a, s = (x.astype(f32), None) if is_float else self.integers(name, x)
        rows = []
        for t in range(len(x)):
            row = []
            for j, e in enumerate(index[t]):
                e = (
                    (e + 1) % self.config.n_routed_experts
                    if (self.fault, name) == ("next expert", "expert_down")
                    else e
                )
                at = (slice(t, t + 1), j) if x.ndim == 3 else slice(t, t + 1)
                some = a[at].reshape(1, -1)
                parts = [
                    some @ self.w[f"{w.format(e=e)}.weight"].astype(f32).T
                    if is_float
                    else self.times(name, w.format(e=e), some, s[at].reshape(1))
                    for w in self.weights(name)
                ]
                row.append(np.concatenate(parts, axis=-1)[0])
            rows.append(np.stack(row))
        return self.keep(name, np.stack(rows))

    def compute(self) -> dict[str, np.ndarray]:
        config, hidden = self.config, self.w["hidden"]
        t, n, d, v, c = (
            len(hidden),
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.v_head_dim,
            config.kv_lora_rank,
        )
        inner = 1e-6 if self.fault == "eps 1e-6" else config.rms_norm_eps
        x = self.norm("input_norm", hidden, "input_layernorm", inner)
        q = x
        if config.q_lora_rank is not None:
            eps = config.rms_norm_eps if self.fault == "eps of the config" else 1e-6
            q = self.norm("q_a_norm", self.product("q_a", x), "self_attn.q_a_layernorm", eps)
        q = self.product("q", q, (t, n, d + config.qk_rope_head_dim))
        turned = self.rotate("query", q[..., d:])
        query = self.keep("query", np.concatenate([q[..., :d].astype(f32), turned], axis=-1))
        kv = self.product("kv_a", x)
        eps = config.rms_norm_eps if self.fault == "eps of the config in c_kv" else 1e-6
        c_kv = self.norm("c_kv", kv[:, :c], "self_attn.kv_a_layernorm", eps)
        k_rope = self.keep("k_rope", self.rotate("k_rope", kv[:, c:]))
        both = c_kv.astype(f32) @ self.w["self_attn.kv_b_proj.weight"].astype(f32).T
        if self.fault == "key value apart":
            key, value = both[:, : n * d].reshape(t, n, d), both[:, n * d :].reshape(t, n, v)
        else:
            key, value = np.split(both.reshape(t, n, d + v), [d], axis=2)
        key, value = self.keep("key", key), self.keep("value", value)
        whole = np.concatenate([key, np.broadcast_to(k_rope[:, None], (t, n, k_rope.shape[1]))], axis=2)
        self.attend(query, whole, value)
        o = self.product("o", self.out["attention"]).astype(f32)
        attended = self.keep("attended", o if self.fault == "residual" else hidden.astype(f32) + o)
        x = self.norm("post_norm", attended, "post_attention_layernorm", config.rms_norm_eps)
        first = (hidden if self.fault == "first residual again" else attended).astype(f32)
        if not self.case.is_moe:
            down = self.mlp("", x).astype(f32)
            self.keep("out", down if self.fault == "second residual" else first + down)
            return self.out
        index, weight = self.route(x)
        y = self.expert_product("expert_gate_up", x, index)
        y = self.expert_product("expert_down", self.activate("expert_activated", y), index)
        by = weight.astype(f16).astype(f32) if self.fault == "weights in fp16" else weight
        routed = self.keep("routed", (y.astype(f32) * by[..., None]).sum(axis=1, dtype=f32)).astype(f32)
        shared = self.mlp("shared_", x).astype(f32) if config.n_shared_experts else f32(0)
        if self.fault == "two roundings":
            self.keep("out", first + (routed + shared).astype(f16).astype(f32))
            return self.out
        shared = f32(0) if self.fault == "shared forgotten" else shared
        first = f32(0) if self.fault == "second residual" else first
        self.keep("out", first + routed + shared)
        return self.out


def layer(case, fault: str = "", alter: Alter | None = None, *, is_vendor: bool = False) -> dict[str, np.ndarray]:
    """Every tensor of a result; `is_vendor`: norms round before the weight, too, and cosines and sines are FP16."""
    return Twin(case, fault, alter, is_vendor=is_vendor).compute()
