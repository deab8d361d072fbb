"""``inclavare measure``: compute MRENCLAVE, and compare it with what an image carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ._enclaves import built_by_other_code, differences, image_of, manifest_option, read_manifest, tls_option
from ._output import Steps, json_option, print_fields, print_json


@click.command("measure")
@click.argument("source")
@manifest_option
@click.option("--tee", help="The only TEE platform, as for build; for a source that is no enclave image yet.")
@click.option("--debug/--no-debug", default=None, help="As for build.")
@tls_option
@json_option
def command(
    *, source: str, manifest_path: Path | None, tee: str | None, debug: bool | None, tls_verify: bool, as_json: bool
) -> None:
    """Measure every file of SOURCE and compute MRENCLAVE.

    An enclave image is measured under its own manifest, and what comes out is compared with its SIGSTRUCT; exit code 7
    if they differ. Anything else, or with -m, is measured as `build` would.
    """
    from ..enclave import build, oci, stored
    from ..enclave.programs import work_directory
    from ..enclave.reference import Reference
    from ..enclave.signing import check_sigstruct
    from ..errors import IntegrityError
    from ..sgx.sigstruct import mrsigner

    text, name = read_manifest(manifest_path)
    with Steps() as steps, work_directory() as work:
        opened = oci.open_source(Reference.parse(source), work, steps, tls_verify=tls_verify)
        carried = stored.read(opened.rootfs)
        own = carried is not None and manifest_path is None and tee is None and debug is None
        if carried is not None and own:
            manifest = carried.manifest
        else:
            manifest = build.derive_manifest(
                opened.config, opened.rootfs, source=text, source_name=name, tee=tee, debug=debug
            )
        identity = build.measure(manifest, opened.rootfs, image_of, steps)
        result: dict[str, Any] = build.identity_dict(identity)
        problem: IntegrityError | None = None
        if carried is not None and own:
            try:
                if carried.tree.root != identity.tree.root:
                    carried.tree.verify_root(carried.tree.root)
                    result["differences"] = differences(carried.tree, identity.tree)
                if carried.sigstruct is not None:
                    parsed = check_sigstruct(carried.sigstruct, identity.image, manifest, identity.mrenclave)
                    result["mrsigner"] = mrsigner(parsed.modulus).hex()
            except IntegrityError as error:
                problem = error
            result["sigstruct"] = (
                "missing"
                if carried.sigstruct is None and problem is None
                else "matches"
                if problem is None
                else "differs"
            )
            if problem is not None:
                problem.remedy = built_by_other_code(carried) or problem.remedy
                result["problem"] = problem.to_dict()
    if as_json:
        print_json(result)
    else:
        _show(result)
    if problem is not None:
        if as_json:
            click.get_current_context().exit(problem.exit_code)
        raise problem


def _show(result: dict[str, Any]) -> None:
    names = {
        "mrenclave": "MRENCLAVE",
        "mrsigner": "MRSIGNER",
        "tree_root": "tree root",
        "manifest_digest": "manifest digest",
        "paths": "paths",
        "sigstruct": "SIGSTRUCT",
    }
    print_fields([(label, result[key]) for key, label in names.items() if key in result])
    if result.get("differences"):
        click.echo("\nFiles that differ from what was measured when the image was built:")
        for line in result["differences"]:
            click.echo(f"  {line}")
