"""Decoder layers for tests: cases, and every stage computed again in NumPy from the formulas.

`check_stages` takes each stage's inputs from the result itself. Integers and quantised products are compared bit by
bit, everything else with float64 within the roundings that the stage has. Nothing of npu_backend or cpjax is called.
"""

import hashlib
import json

import numpy as np
from npu_strategies import FORMATS, rounding_bound
from oracle import dense
from safetensors.numpy import load_file, save_file

f16, f32, f64 = np.float16, np.float32, np.float64
U, TINY = 2.0**-11, 2.0**-25  # half a unit in the last place of FP16, and half its smallest number
NAMES = {"float16": "F16", "float32": "F32", "int32": "I32", "int8": "I8", "int64": "I64"}
YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 128,
    "num_attention_heads": 2,
    "kv_lora_rank": 48,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-3,
    "rope_theta": 10000.0,
    "max_position_embeddings": 163840,
    "rope_scaling": YARN,
}
BIAS = "mlp.gate.e_score_correction_bias"


def linear_shapes(config, is_moe):
    """Name → (n, k) of what may be quantised."""
    wide, heads, latent = (config[x] for x in ("hidden_size", "num_attention_heads", "kv_lora_rank"))
    low = config["q_lora_rank"]
    found = {"self_attn.q_proj": (heads * 192, wide)}
    if low is not None:
        found = {"self_attn.q_a_proj": (low, wide), "self_attn.q_b_proj": (heads * 192, low)}
    found |= {"self_attn.kv_a_proj_with_mqa": (latent + 64, wide), "self_attn.o_proj": (wide, heads * 128)}
    mlps = {"mlp": config["intermediate_size"]}
    if is_moe:
        inner = config["moe_intermediate_size"]
        mlps = {f"mlp.experts.{e}": inner for e in range(config["n_routed_experts"])}
        if config["n_shared_experts"]:
            mlps["mlp.shared_experts"] = inner * config["n_shared_experts"]
    for name, inner in mlps.items():
        found |= {f"{name}.gate_proj": (inner, wide), f"{name}.up_proj": (inner, wide)}
        found[f"{name}.down_proj"] = (wide, inner)
    return found


# --- quantised weights, made of floats


def quantize(rng, weight, kind, *, groups=1, parts=1, offset=3.0):
    """What a checkpoint has of a weight `[n, k]`."""
    if kind == "FLOAT":
        return {"weight": weight.astype(f16)}
    largest = 7 if kind == "W4A8_DYNAMIC" else 127
    n, k = weight.shape
    scale = (abs(weight).max(axis=1, keepdims=True) / largest).astype(f32)
    integers = np.clip(np.rint(weight / scale), -largest, largest).astype(np.int8)
    column = {"weight_scale": scale, "weight_offset": np.zeros((n, 1), f32)}
    if kind == "W8A8_DYNAMIC":
        return {"weight": integers} | column
    if kind == "W8A8":
        bias = np.rint(-offset * integers.sum(axis=1)) + rng.integers(-50, 50, n)
        deq = f32(0.03) * scale[:, 0]
        return {
            "weight": integers,
            "input_scale": np.array([0.03], f32),
            "input_offset": np.array([offset], f32),
            "deq_scale": deq.view(np.uint32).astype(np.int64),
            "quant_bias": bias.astype(np.int32),
        }
    second = rng.uniform(0.5, 1.5, (n, groups)).astype(f32) if groups > 1 else np.ones((n, 1), f32)
    each = np.repeat(scale.astype(f64) * second, k // groups, axis=1)
    stored = {"weight": (integers[1::2] << 4 | integers[0::2] & 15).astype(np.int8)} | column
    stored["scale_bias"] = 8 * (integers * each).reshape(n, parts, -1).sum(axis=2).astype(f32)
    return stored | ({"weight_scale_second": second} if groups > 1 else {})


def layer(seed, *, is_moe, tokens=24, kind="FLOAT", expert_kind=None, arithmetic="vendor", groups=1, **changes):
    """Description and tensors of a case; `expert_kind` is that of routed experts, `kind` of all else."""
    rng, config = np.random.default_rng(seed), CONFIG | changes
    wide, latent, heads = config["hidden_size"], config["kv_lora_rank"], config["num_attention_heads"]
    arrays = {"hidden": (rng.standard_normal((tokens, wide)) * 2).astype(f16)}
    arrays["position"] = np.arange(tokens, dtype=np.int32)
    norms = {"input_layernorm": wide, "post_attention_layernorm": wide, "self_attn.kv_a_layernorm": latent}
    norms |= {"self_attn.q_a_layernorm": config["q_lora_rank"]} if config["q_lora_rank"] else {}
    for name, size in norms.items():
        arrays[f"{name}.weight"] = rng.uniform(0.5, 1.5, size).astype(f16)
    arrays["self_attn.kv_b_proj.weight"] = (rng.standard_normal((heads * 256, latent)) / latent**0.5).astype(f16)
    if is_moe:
        experts = config["n_routed_experts"]
        arrays["mlp.gate.weight"] = (rng.standard_normal((experts, wide)) / wide**0.5).astype(f32)
        arrays[BIAS] = rng.uniform(-0.2, 0.2, experts).astype(f32)
    kinds = {}
    for name, (n, k) in linear_shapes(config, is_moe).items():
        kinds[name] = (expert_kind or kind) if ".experts." in name else kind
        weight = rng.standard_normal((n, k)) / k**0.5
        parts = 16 if name.endswith(("down_proj", "o_proj")) else 1
        stored = quantize(rng, weight, kinds[name], groups=groups, parts=parts)
        arrays |= {f"{name}.{part}": array for part, array in stored.items()}
    case = {"config": config, "is_moe": is_moe, "kinds": kinds, "arithmetic": arithmetic, "about": "a layer for tests"}
    return case, arrays


def write_layer(folder, name, case, arrays, /, **changes):
    """A case file as docs/formats.md says."""
    text = json.dumps(case)
    sha = hashlib.sha256(text.encode())
    for key in sorted(arrays):
        words = (key, NAMES[str(arrays[key].dtype)], ",".join(map(str, arrays[key].shape)))
        sha.update(b"".join(word.encode() + b"\0" for word in words))
        sha.update(np.ascontiguousarray(arrays[key]).tobytes())
    metadata = {"format": "cpjax.layer", "version": "1", "name": name, "digest": sha.hexdigest(), "case": text}
    metadata |= changes
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path, metadata)
    return path


# --- the stages, again


def bits(got, wanted, what):
    """Bit for bit."""
    assert got.dtype == wanted.dtype, what
    np.testing.assert_array_equal(got, wanted, err_msg=what)


def near(got, wanted, bound, what):
    """Within the bound, everywhere; NaN fails."""
    assert got.shape == wanted.shape, what
    error = abs(got.astype(f64) - wanted)
    assert (error <= bound).all(), f"{what}: {(error / bound).max():.3g} of the bound"


def rms(x, weight, eps):
    x = x.astype(f64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight.astype(f64)


def near_product(got, x, weight, what):
    """FP16 x by FP16 rows of `weight`: float32 sums, one cast."""
    x, weight = x.astype(f64), weight.astype(f64)
    exact, size = x @ weight.T, abs(x) @ abs(weight).T
    near(got, exact, U * abs(exact) + x.shape[-1] * 2.0**-23 * size + TINY, what)


def unpacked(packed):
    out = np.empty((2 * len(packed), packed.shape[1]), np.int8)
    out[0::2], out[1::2] = (packed << 4) >> 4, packed >> 4
    return out


def cut(scale):
    return (scale.view(np.uint32) & np.uint32(0xFFFFE000)).view(f32)


def integers_of(x, weights, kind):
    """(integers, scale of each token or None) of `[…, k]`."""
    if kind == "W8A8":
        scaled, scale = x.astype(f32) / weights["input_scale"][0] + weights["input_offset"][0], None
    else:
        scale = (abs(x.astype(f32)).max(axis=-1) / f32(127)).astype(f32)
        scaled = x.astype(f32) / np.where(scale > 0, scale, f32(1))[..., None]
    return np.clip(np.rint(scaled), -128, 127).astype(np.int8), scale


def product_of_integers(a, token_scale, weights, kind, arithmetic):
    """`[…, n]` float16 of one layer's integers."""
    wide = f64 if arithmetic == "exact" else f32
    if kind == "W8A8":
        scale = weights["deq_scale"].astype(np.uint32).view(f32)
        scale = scale if arithmetic == "exact" else cut(scale)
        sums = a.astype(np.int64) @ weights["weight"].T.astype(np.int64) + weights["quant_bias"]
        return (sums.astype(wide) * scale.astype(wide)).astype(f16)
    token = token_scale[..., None].astype(wide)
    if kind == "W8A8_DYNAMIC":
        sums = a.astype(np.int64) @ weights["weight"].T.astype(np.int64)
        return (sums.astype(wide) * weights["weight_scale"][:, 0].astype(wide) * token).astype(f16)
    weight, scale = unpacked(weights["weight"]).astype(np.int64), weights["weight_scale"]
    scale = scale * weights["weight_scale_second"] if "weight_scale_second" in weights else scale  # [n, G] float32
    each = weight.shape[1] // scale.shape[1]
    parts = [slice(g * each, (g + 1) * each) for g in range(scale.shape[1])]
    if arithmetic == "exact":
        products = (a[..., part].astype(np.int64) @ weight[:, part].T for part in parts)
        total = sum(x * scale[:, g].astype(f64) for g, x in enumerate(products))
        return (total * token).astype(f16)

    def half(x):
        total = None
        for g, part in enumerate(parts):
            some = ((x[..., part] @ weight[:, part].T).astype(f32) * cut(np.ascontiguousarray(scale[:, g]))).astype(f16)
            total = some if total is None else total + some
        return total.astype(f32)

    high, low = a.astype(np.int64) // 16, a.astype(np.int64) % 16 - 8
    bias = weights["scale_bias"].sum(axis=1, dtype=f32)
    return ((f32(16) * half(high) + half(low) + bias) * token).astype(f16)


class Stages:
    """A case and its result."""

    def __init__(self, case, arrays, result):
        self.case, self.config, self.arrays, self.result = case, case["config"], arrays, result
        self.seen = set()

    def __getitem__(self, name):
        self.seen.add(name)
        return self.result[name]

    def weights(self, *names):
        """Parts of layers that are computed together, one below the other."""
        parts = [{k.rpartition(".")[2]: v for k, v in self.arrays.items() if k.rpartition(".")[0] == x} for x in names]
        once = ("input_scale", "input_offset")
        return {k: parts[0][k] if k in once else np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def linear(self, stage, x, *names):
        """Check a product of tokens `[T, k]`."""
        kind, weights = self.case["kinds"][names[0]], self.weights(*names)
        got = self[stage].reshape(len(x), -1)
        if kind == "FLOAT":
            near_product(got, x, weights["weight"], stage)
            return
        a, scale = integers_of(x, weights, kind)
        bits(self[f"{stage}.integers"].reshape(a.shape), a, f"{stage}.integers")
        if scale is not None:
            bits(self[f"{stage}.token_scale"], scale, f"{stage}.token_scale")
        wanted = product_of_integers(a, scale, weights, kind, self.case["arithmetic"])
        self._same(got, wanted, stage)

    def _same(self, got, wanted, what):
        if self.case["arithmetic"] == "vendor":
            bits(got, wanted, what)
        else:  # sums of float64 in another order may fall on the other side of a tie
            near(got, wanted.astype(f64), 2.001 * U * abs(wanted.astype(f64)) + 2 * TINY, what)
            assert (got != wanted).mean() < 0.01, what


def check_stages(case, arrays, path):
    """Every stage of the result at `path`."""
    s = Stages(case, arrays, load_file(path))
    _attention(s)
    _experts(s) if case["is_moe"] else _dense(s)
    assert s.seen == set(s.result), f"not checked or missing: {s.seen ^ set(s.result)}"


def near_norm(s, stage, x, weight, eps, roundings=1):
    wanted = rms(x, weight, eps)
    near(s[stage], wanted, roundings * (U * 1.001 * abs(wanted) + TINY), stage)


def _attention(s):
    config, arrays = s.config, s.arrays
    near_norm(s, "input_norm", arrays["hidden"], arrays["input_layernorm.weight"], config["rms_norm_eps"])
    x = s["input_norm"]
    if config["q_lora_rank"] is None:
        s.linear("q", x, "self_attn.q_proj")
    else:
        s.linear("q_a", x, "self_attn.q_a_proj")
        near_norm(s, "q_a_norm", s["q_a"], arrays["self_attn.q_a_layernorm.weight"], 1e-6)
        s.linear("q", s["q_a_norm"], "self_attn.q_b_proj")
    cos, sin = angles(config, arrays["position"])
    bits(s["query"][..., :128], s["q"][..., :128], "query without rope")
    _near_rope(s["query"][..., 128:], s["q"][..., 128:], cos[:, None], sin[:, None], "query")
    s.linear("kv_a", x, "self_attn.kv_a_proj_with_mqa")
    latent = config["kv_lora_rank"]
    weight = arrays["self_attn.kv_a_layernorm.weight"]
    near_norm(s, "c_kv", s["kv_a"][:, :latent], weight, 1e-6)
    _near_rope(s["k_rope"], s["kv_a"][:, latent:], cos, sin, "k_rope")
    up = arrays["self_attn.kv_b_proj.weight"].reshape(-1, 256, latent)
    for head, rows in enumerate(up):
        near_product(s["key"][:, head], s["c_kv"], rows[:128], "key")
        near_product(s["value"][:, head], s["c_kv"], rows[128:], "value")
    _near_attention(s)
    s.linear("o", s["attention"].reshape(len(x), -1), "self_attn.o_proj")
    bits(s["attended"], arrays["hidden"] + s["o"], "attended")
    weight = arrays["post_attention_layernorm.weight"]
    near_norm(s, "post_norm", s["attended"], weight, config["rms_norm_eps"], roundings=2)


def angles(config, position):
    """Cosines and sines in float64, `[T, 32]`."""
    plain = config["rope_theta"] ** -(np.arange(32) / 32)
    yarn, factor = config["rope_scaling"], 1.0
    if yarn is not None:
        length, theta = yarn["original_max_position_embeddings"], config["rope_theta"]
        turns = np.array([yarn["beta_fast"], yarn["beta_slow"]])
        ends = 64 * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta))
        low, high = max(np.floor(ends[0]), 0), min(np.ceil(ends[1]), 63)
        ramp = np.clip((np.arange(32) - low) / (high - low), 0, 1)
        plain = plain / yarn["factor"] * ramp + plain * (1 - ramp)
        both = yarn.get("mscale") and yarn.get("mscale_all_dim")
        factor = g(yarn, yarn["mscale"]) / g(yarn, yarn["mscale_all_dim"]) if both else g(yarn, 1.0)
    angle = position[:, None] * plain
    return np.cos(angle) * factor, np.sin(angle) * factor


def g(yarn, m):
    return 0.1 * m * np.log(yarn["factor"]) + 1


def _near_rope(got, x, cos, sin, what):
    """Rounded: cosines and sines to FP16, and the result."""
    a, b = x[..., 0::2].astype(f64), x[..., 1::2].astype(f64)
    wanted = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    size = np.concatenate([abs(a * cos) + abs(b * sin), abs(b * cos) + abs(a * sin)], axis=-1)
    tiny = TINY * (1 + np.tile(abs(a) + abs(b), 2))
    near(got, wanted, U * 1.001 * (size + abs(wanted)) + tiny, what)


def _near_attention(s):
    config = s.config
    yarn = config["rope_scaling"]
    scale = 192**-0.5 * (g(yarn, yarn["mscale_all_dim"]) ** 2 if yarn and yarn.get("mscale_all_dim") else 1)
    k_rope = np.repeat(s["k_rope"][:, None], config["num_attention_heads"], axis=1)
    query, value = s["query"][None], s["value"][None]
    key = np.concatenate([s["key"], k_rope], axis=-1)[None]
    visible = np.tril(np.ones((1, query.shape[1], query.shape[1]), bool))
    out, lse = dense(query, key, value, scale=scale, visible=visible)
    bound = rounding_bound(query, key, value, visible, scale, 0, FORMATS["ring_mla_fp16"])
    near(s["attention"], out[0], bound[0][0], "attention")
    near(s["lse"], lse[0], bound[1][0], "lse")
    assert s["lse"].dtype == f32


def _activated(s, stage, gate_up):
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :half].astype(f64), gate_up[..., half:].astype(f64)
    wanted = gate / (1 + np.exp(-gate)) * up
    near(s[stage], wanted, U * 1.002 * abs(wanted) + TINY, stage)


def _mlp(s, x, name, prefix=""):
    s.linear(f"{prefix}gate_up", x, f"{name}.gate_proj", f"{name}.up_proj")
    _activated(s, f"{prefix}activated", s[f"{prefix}gate_up"])
    s.linear(f"{prefix}down", s[f"{prefix}activated"], f"{name}.down_proj")


def _dense(s):
    _mlp(s, s["post_norm"], "mlp")
    bits(s["out"], s["attended"] + s["down"], "out")


def _experts(s):
    config, x = s.config, s["post_norm"]
    gate = s.arrays["mlp.gate.weight"].astype(f64)
    exact, size = x.astype(f64) @ gate.T, abs(x).astype(f64) @ abs(gate).T
    near(s["router_logits"], exact, x.shape[1] * 2.0**-23 * size, "router_logits")
    _router(s)
    _grouped(s, "expert_gate_up", np.repeat(x[:, None], config["num_experts_per_tok"], axis=1), "gate_proj", "up_proj")
    _activated(s, "expert_activated", s["expert_gate_up"])
    _grouped(s, "expert_down", s["expert_activated"], "down_proj")
    parts = s["expert_down"].astype(f64) * s["expert_weight"].astype(f64)[..., None]
    slack = 2.0**-22 * abs(parts).sum(axis=1)
    near(s["routed"], parts.sum(axis=1), U * abs(parts.sum(axis=1)) + slack + TINY, "routed")
    total = s["attended"].astype(f64) + s["routed"]
    if config["n_shared_experts"]:
        _mlp(s, x, "mlp.shared_experts", "shared_")
        total = total + s["shared_down"]
    near(s["out"], total, U * 1.001 * abs(total) + TINY, "out")


def _router(s):
    config, groups = s.config, s.config["n_group"]
    for token, logits in enumerate(s["router_logits"].astype(f64)):
        score = 1 / (1 + np.exp(-logits))
        choice = (score + s.arrays[BIAS]).reshape(groups, -1)
        of_group = np.sort(choice, axis=1)[:, -2:].sum(axis=1)
        kept = np.argsort(-of_group)[: config["topk_group"]]
        left = np.full_like(choice, -np.inf)
        left[kept] = choice[kept]
        chosen = np.argsort(-left.ravel())[: config["num_experts_per_tok"]]
        assert s["expert_index"][token].tolist() == chosen.tolist()
        weight = config["routed_scaling_factor"] * score[chosen] / score[chosen].sum()
        np.testing.assert_allclose(s["expert_weight"][token], weight, rtol=2e-6)


def _grouped(s, stage, x, *parts):
    """Check products of experts, `x` `[T, k, …]`; a token's integers for gate and up are stated once."""
    kind = s.case["kinds"][f"mlp.experts.0.{parts[0]}"]
    if kind != "FLOAT":
        stated = x[:, 0] if len(parts) == 2 else x
        a, scale = integers_of(stated, {}, kind)
        bits(s[f"{stage}.integers"], a, f"{stage}.integers")
        bits(s[f"{stage}.token_scale"], scale, f"{stage}.token_scale")
    for t, j in np.ndindex(*x.shape[:2]):
        weights = s.weights(*(f"mlp.experts.{s['expert_index'][t, j]}.{part}" for part in parts))
        if kind == "FLOAT":
            near_product(s[stage][t, j], x[t, j], weights["weight"], stage)
        else:
            a, scale = integers_of(x[t, j], {}, kind)
            s._same(s[stage][t, j], product_of_integers(a, scale, weights, kind, s.case["arithmetic"]), stage)


# --- the whole layer in float64, of float weights


def whole_layer(case, arrays):
    """`[T, M]` float64: the layer as a function, nothing rounded."""
    config, w = case["config"], {name: x.astype(f64) for name, x in arrays.items()}
    x = rms(w["hidden"], w["input_layernorm.weight"], config["rms_norm_eps"])
    if config["q_lora_rank"] is None:
        q = x @ w["self_attn.q_proj.weight"].T
    else:
        q_a = rms(x @ w["self_attn.q_a_proj.weight"].T, w["self_attn.q_a_layernorm.weight"], 1e-6)
        q = q_a @ w["self_attn.q_b_proj.weight"].T
    cos, sin = angles(config, arrays["position"])

    def rope(x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q = q.reshape(len(x), -1, 192)
    q = np.concatenate([q[..., :128], rope(q[..., 128:], cos[:, None], sin[:, None])], axis=-1)
    kv = x @ w["self_attn.kv_a_proj_with_mqa.weight"].T
    latent = config["kv_lora_rank"]
    heads = rms(kv[:, :latent], w["self_attn.kv_a_layernorm.weight"], 1e-6) @ w["self_attn.kv_b_proj.weight"].T
    heads = heads.reshape(len(x), -1, 256)
    key = np.concatenate([heads[..., :128], np.repeat(rope(kv[:, latent:], cos, sin)[:, None], q.shape[1], 1)], axis=-1)
    yarn = config["rope_scaling"]
    scale = 192**-0.5 * (g(yarn, yarn["mscale_all_dim"]) ** 2 if yarn else 1)
    visible = np.tril(np.ones((1, len(x), len(x)), bool))
    out, _ = dense(q[None], key[None], heads[None, ..., 128:], scale=scale, visible=visible)
    attended = w["hidden"] + out[0].reshape(len(x), -1) @ w["self_attn.o_proj.weight"].T
    x = rms(attended, w["post_attention_layernorm.weight"], config["rms_norm_eps"])

    def mlp(x, name):
        gate, up = (x @ w[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
        return gate / (1 + np.exp(-gate)) * up @ w[f"{name}.down_proj.weight"].T

    if not case["is_moe"]:
        return attended + mlp(x, "mlp")
    total = attended + (mlp(x, "mlp.shared_experts") if config["n_shared_experts"] else 0)
    for token, row in enumerate(x):
        score = 1 / (1 + np.exp(-(w["mlp.gate.weight"] @ row)))
        choice = (score + w[BIAS]).reshape(config["n_group"], -1)
        kept = np.argsort(-np.sort(choice, axis=1)[:, -2:].sum(axis=1))[: config["topk_group"]]
        left = np.full_like(choice, -np.inf)
        left[kept] = choice[kept]
        chosen = np.argsort(-left.ravel())[: config["num_experts_per_tok"]]
        for e in chosen:
            weight = config["routed_scaling_factor"] * score[e] / score[chosen].sum()
            total[token] += weight * mlp(row, f"mlp.experts.{e}")
    return total
