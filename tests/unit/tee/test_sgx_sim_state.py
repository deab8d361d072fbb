"""The platform's state: made once by whoever comes first, kept across processes, private, and refused if damaged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_enclaves import Signers, sign_image, small_image

from inclavare.config import Config
from inclavare.errors import PlatformError
from inclavare.tee import base
from inclavare.tee.sgx_sim import SimulatedEnclave, SimulatedPlatform, create, fuses

RACE = """
import hashlib, sys
from pathlib import Path
from inclavare.config import Config
from inclavare.tee.sgx_sim import create
platform = create(Config(state_dir=Path(sys.argv[1]) / "state", run_dir=Path(sys.argv[1]) / "run"))
sys.stdin.readline()
print(hashlib.sha256(platform.root_ca()).hexdigest(), platform._session()._roots.seal.hex())
"""

SEAL = """
import sys
from pathlib import Path
from inclavare.config import Config
from inclavare.tee.sgx_sim import create
sys.path.insert(0, sys.argv[2])
from small_enclaves import small_image
base = Path(sys.argv[1])
platform = create(Config(state_dir=base / "state", run_dir=base / "run"))
enclave = platform.load(small_image(b"sealed"), Path(sys.argv[3]).read_bytes(), label="other process")
print(enclave.seal_key("mrenclave").hex(), enclave.seal_key("mrsigner").hex(), platform.root_ca().hex())
"""


def test_twenty_processes_agree_on_the_platform(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(20)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = {racer.communicate()[0] for racer in racers}
    assert all(racer.returncode == 0 for racer in racers)
    assert len(answers) == 1 and len(answers.pop().split()) == 2


def test_keys_survive_a_new_process(config: Config, signers: Signers, tmp_path: Path) -> None:
    platform = create(config)
    image = small_image(b"sealed")
    signature = tmp_path / "sigstruct"
    signature.write_bytes(sign_image(image, signers.ours).to_bytes())
    enclave = platform.load(image, signature.read_bytes(), label="this process")
    expected = [enclave.seal_key("mrenclave").hex(), enclave.seal_key("mrsigner").hex(), platform.root_ca().hex()]
    helpers = str(Path(__file__).resolve().parent.parent)
    output = subprocess.run(
        [sys.executable, "-c", SEAL, str(tmp_path), helpers, str(signature)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert output.split() == expected


def test_files_are_private(platform: SimulatedPlatform) -> None:
    platform.collateral()
    directory = platform._config.platform_dir
    assert directory.stat().st_mode & 0o777 == 0o700
    names = {path.name for path in directory.iterdir()}
    assert {"fuses", "provisioning.json", "collateral.json", ".lock"} <= names
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.iterdir())


@pytest.mark.parametrize("damage", [b"", b"\0" * 112, None])
def test_damaged_fuses_are_not_replaced_silently(config: Config, damage: bytes | None) -> None:
    fuses.load(config.platform_dir)
    path = config.platform_dir / fuses.FILE
    whole = path.read_bytes()
    broken = bytes([*whole[:20], whole[20] ^ 1, *whole[21:]]) if damage is None else damage
    path.write_bytes(broken)
    with pytest.raises(PlatformError) as caught:
        fuses.load(config.platform_dir)
    assert caught.value.id == "tee.fuses.damaged"
    assert path.read_bytes() == broken


@pytest.mark.parametrize("content", ["", "{}", '{"version": 1}', '{"version": 99}'])
def test_damaged_provisioning(config: Config, content: str) -> None:
    fuses.load(config.platform_dir)
    (config.platform_dir / "provisioning.json").write_text(content)
    with pytest.raises(PlatformError) as caught:
        create(config).root_ca()
    assert caught.value.id == "tee.provisioning.damaged"


def test_certificates_of_other_fuses_are_refused(config: Config) -> None:
    create(config).root_ca()
    (config.platform_dir / fuses.FILE).unlink()
    with pytest.raises(PlatformError) as caught:
        create(config).root_ca()
    assert caught.value.id == "tee.provisioning.damaged"


def test_world_readable_state_is_refused(config: Config) -> None:
    config.platform_dir.mkdir(parents=True)
    config.platform_dir.chmod(0o755)
    with pytest.raises(PlatformError) as caught:
        fuses.load(config.platform_dir)
    assert caught.value.id == "tee.state.permissions"
    assert "chmod 700" in str(caught.value.remedy)


def test_found_by_name(config: Config) -> None:
    platform = base.usable_platform("sgx-sim", config)
    assert (platform.name, platform.simulated) == ("sgx-sim", True)
    assert not config.platform_dir.exists(), "looking must not make anything"


def test_loading_imports_no_cryptographic_library(config: Config, signers: Signers, tmp_path: Path) -> None:
    """The container start path: fuses, EPC, measurement, SIGSTRUCT and page encryption."""
    signature = tmp_path / "sigstruct"
    signature.write_bytes(sign_image(small_image(b"sealed"), signers.ours).to_bytes())
    helpers = str(Path(__file__).resolve().parent.parent)
    code = SEAL.replace("from small_enclaves import small_image", "import small_enclaves_light").partition("print(")[0]
    light = tmp_path / "small_enclaves_light.py"
    light.write_text(f"import pickle\nimage = pickle.loads({_pickled_image()!r})\n")
    code = code.replace('small_image(b"sealed")', "small_enclaves_light.image")
    code += "\nassert enclave.epc_pages == 8\nheavy = {'cryptography', 'dcap_qvl', 'msgspec', 'json', 'tomllib'}\n"
    code += "print(sorted(heavy & set(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(tmp_path), str(signature), helpers],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert output.strip() == "[]"


def _pickled_image() -> bytes:
    import pickle

    return pickle.dumps(small_image(b"sealed"))


def test_platform_outlives_its_enclaves(load: Callable[..., SimulatedEnclave], platform: SimulatedPlatform) -> None:
    first = load(b"first")
    first.destroy()
    second = load(b"second")
    assert len(platform.quote(second.report(platform.quote_target_info(), bytes(64)))) > 1000


FULL_DISK = """
import resource, sys
from pathlib import Path
from inclavare.config import Config
from inclavare.errors import ResourceError
from inclavare.tee.sgx_sim import create, epc
base = Path(sys.argv[1])
config = Config(state_dir=base / "state", run_dir=base / "run")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for call in (create(config).root_ca, lambda: epc.reserve(config, 1, "x")):
    try:
        call()
    except ResourceError as error:
        print(error.id, error.exit_code)
"""


def test_file_system_that_takes_no_more(tmp_path: Path, config: Config) -> None:
    """A file-size limit of zero fails writes as a full disk does; nothing half-written is left, and the next try works."""
    output = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout
    assert output.split() == ["tee.state.write", "6"] * 2
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert left == []
    assert create(config).root_ca()
