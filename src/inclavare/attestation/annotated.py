"""Annotated evidence: what a policy in Rego finds under ``input``, and what a token carries beside the vector.

The layout is Trustee's: claims by TEE, and beside them what the evidence vouches for, as data::

    {"tdx": {…}, "report_data": "<hex>", "runtime_data_claims": {"nonce": …, "tee-pubkey": …},
     "init_data": "<hex>", "init_data_claims": {"aa.toml": {…}, "agent_policy_claims": {…}}}
"""

from __future__ import annotations

import json
import tomllib
from typing import Any

from .appraisal import Context
from .claims import Claims
from .initdata import data
from .trustee import claims_map

_POLICY_DATA = "policy_data := {"


def annotated_evidence(claims: Claims, context: Context, *, verbose: bool = True) -> dict[str, Any]:
    """Claims and data.

    Args:
        verbose: false leaves out event logs and additional evidence, which make a token too long for a header.
    """
    ((tee, own),) = claims_map(claims).items()
    runtime_data = context.runtime_data
    if not verbose:
        own.pop("uefi_event_logs", None)
        if runtime_data is not None:
            runtime_data = {name: value for name, value in runtime_data.items() if name != "additional-evidence"}
    return {
        "init_data": own.pop("init_data", ""),
        "init_data_claims": None if context.init_data is None else init_data_claims(context.init_data),
        "report_data": own.pop("report_data"),
        "runtime_data_claims": runtime_data,
        tee: own,
    }


def init_data_claims(text: str) -> dict[str, Any]:
    """The files in an init-data text: configurations as data, and of the agent's policy its data, as Trustee does it.

    Raises:
        EvidenceError: ``evidence.init_data.malformed``.
    """
    files: dict[str, Any] = dict(data(text))
    for name in ("cdh.toml", "aa.toml"):
        if name in files:
            try:
                files[name] = json.loads(json.dumps(tomllib.loads(files[name]), default=str))
            except (ValueError, RecursionError):
                continue  # it stays text
    _, marker, after = files.get("policy.rego", "").partition(_POLICY_DATA)
    if marker:
        try:
            agent = json.loads("{" + after)
        except (ValueError, RecursionError):
            return files
        del files["policy.rego"]
        files["agent_policy_claims"] = agent
    return files
