"""From a deployment to cases: attention of one layer, a case for each share of the heads that is computed; decode."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cpjax.crosscheck.files.case import Case, gaussian_case, latent_case
from cpjax.errors import InputError
from cpjax.mindie.check import Finding, check, check_files, setting_of
from cpjax.mindie.config import read_configs
from cpjax.mindie.decode import LATENT, decode_case
from cpjax.mindie.deployment import Deployment, read_deployment
from cpjax.mindie.link import read_pair
from cpjax.mindie.models import Geometry, local_heads, parse_geometry
from cpjax.mindie.models import geometry as geometry_of
from cpjax.mindie.text_file import printable
from cpjax.wording import counted

EXAMPLE = Path(__file__).with_name("deepseek-r1-cp2.json")
"""The vendor's example; examples/deepseek-r1-cp2.json is a link to it."""

MOST_TOKENS = 2048
MOST_CP = 64
PRECISION = {"spec": "flash_fp16", "npu": "ring_mla_fp16"}


def cases_of(
    config: Path | None,
    *,
    tokens: int | None = None,
    geometry: str | None = None,
    seed: int = 0,
    shares: int = 1,
    decode: bool = False,
    latent: bool = False,
) -> tuple[list[Case], list[str]]:
    """The cases of a config file (None: the vendor's example), and remarks for the user.

    Args:
      tokens: length of the prompt; None: the smaller of maxInputTokenLen and 2,048.
      geometry: HEADS,NOPE,ROPE,VALUE, with scale 1/√(NOPE + ROPE); None: by the model's name, with its own scale.
      shares: of the tp shares of the heads so many are computed, a case each, with other inputs.
      decode: also a case of decode, over the cache that cp·sp ranks share.
      latent: of the prompt the latent is given, of which each rank makes keys and values, as in MindIE.

    Raises:
      InputError: what cannot be read or computed, and what `cpjax mindie check` refuses.
    """
    deployment = accepted(EXAMPLE if config is None else config)
    identity = setting_of(deployment).identity
    shape = geometry_of(identity, deployment.model_name) if geometry is None else parse_geometry(geometry)
    sizes = deployment.sizes
    heads = local_heads(shape.heads, sizes.tp)
    remarks = list(deployment.warnings)
    if sizes.cp > MOST_CP:
        raise InputError(f"{deployment.path}: cp is {sizes.cp}; at most {MOST_CP} ranks are computed here")
    if tokens is not None and not 1 <= tokens <= deployment.max_seq_len:
        raise InputError(f"--tokens is {tokens}; it must be from 1 to the config's maxSeqLen, {deployment.max_seq_len}")
    tokens = min(deployment.max_input_token_len, MOST_TOKENS) if tokens is None else tokens
    head_dim = shape.nope + shape.rope
    if not 1 <= shares <= sizes.tp:
        raise InputError(f"--shares is {shares}; it must be from 1 to the config's tp, {sizes.tp}")
    if shares < sizes.tp:
        remarks.append(
            f"scaled down: {shares * sizes.cp} of {sizes.cp * sizes.tp} cards are computed, "
            f"{counted(heads, 'head')} each; other tensor-parallel shares do the same on other heads (--shares "
            f"{sizes.tp} computes all)"
        )
    about = {"config": deployment.path.name, "model": deployment.model_name, "tp": sizes.tp, "tokens": tokens}
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in deployment.path.stem)
    cases = [
        gaussian_case(
            f"{name}-{tokens}" + (f"-tp{share}" if shares > 1 else ""),
            (tokens, heads, heads, head_dim, shape.value_dim),
            cp=sizes.cp,
            precision=PRECISION,
            seed=seed + share,
            about=about | {"tp_rank": share},
            scale=shape.scale,
        )
        for share in range(shares)
    ]
    if latent:
        cases = _of_latents(cases, shape, seed + shares)
    cache_ranks = sizes.cp * sizes.sp
    if not decode:
        if sizes.sp > 1:
            remarks.append(
                f"decode over the cache that cp·sp = {cache_ranks} ranks share is computed with --decode only"
            )
        return cases, remarks
    if cache_ranks > MOST_CP:
        raise InputError(f"{deployment.path}: cp·sp is {cache_ranks}; at most {MOST_CP} ranks are computed here")
    cases.append(decode_case(f"{name}-{tokens}-decode", shape, tokens, cache_ranks, seed, about | {"sp": sizes.sp}))
    return cases, remarks


def accepted(config: Path) -> Deployment:
    """The deployment, of MindIE-Motor's file the prefill one, if MindIE takes it: a verdict on another is no use."""
    deployment = read_deployment(config, role="prefill")
    _refuse(config, check(setting_of(deployment)))
    return deployment


def accepted_pair(prefill: Path, decode: Path | None) -> tuple[Deployment, Deployment]:
    """The two deployments of a disaggregated one, if MindIE takes both, and one beside the other.

    Args:
      decode: None: `prefill` is MindIE-Motor's file, which has both.

    Raises:
      InputError: what cannot be read, and what `cpjax mindie check` and `cpjax mindie link` refuse.
    """
    pair = read_pair(prefill, decode)
    paths, roles = ([prefill], ()) if decode is None else ([prefill, decode], ("prefill", "decode"))
    for deployment, checked in zip(pair, check_files(paths, roles=roles), strict=True):
        _refuse(deployment.path, checked.findings)
    return pair


def is_pair(config: Path) -> bool:
    """Whether a file is MindIE-Motor's with a prefill and a decode part."""
    return {file.role for file in read_configs(config)} == {"prefill", "decode"}


def _refuse(config: Path, findings: Iterable[Finding]) -> None:
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        named = "; ".join(f"{finding.rule} ({finding.found})" for finding in errors[:4])
        raise InputError(
            f"{printable(config)}: MindIE does not take this config: {named}; see cpjax mindie check. Case files "
            "(docs/formats.md) may have any sizes"
        )


def _of_latents(cases: list[Case], shape: Geometry, seed: int) -> list[Case]:
    """The same prompts, of which latents are given; each has seeds of its own, from `seed` on."""
    if shape.rope == 0:
        raise InputError("the geometry has no rotary part; --latent needs one, as 128,128,64,128")
    return [
        latent_case(replace(case, name=f"{case.name}-latent"), LATENT, nope=shape.nope, seed=seed + share)
        for share, case in enumerate(cases)
    ]
