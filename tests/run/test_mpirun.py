"""The mpirun line says everything absolutely, and its environment holds only what is listed."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_empire.cluster.hostfile import parse_hostfile
from mlx_empire.errors import UserError
from mlx_empire.run.mpirun import Launch, clean_environment, mpirun, mpirun_line, printed

MACS = parse_hostfile("king.local slots=1\nsoldier.local slots=1\n", "macs.txt")
LAUNCH = Launch(Path("macs.txt"), MACS, Path("recipe.yaml"), ("run.steps=5",))


def test_the_line() -> None:
    here = os.getcwd()
    assert mpirun_line(LAUNCH, {"PYTHONPATH": "x", "PATH": "y"}) == [
        str(mpirun()),
        *("-hostfile", f"{here}/macs.txt", "--bind-to", "none"),
        *(
            "--mca",
            "btl_tcp_eager_limit",
            "263168",
            "--mca",
            "btl_tcp_max_send_size",
            "263168",
            "-x",
            "PYTHONPATH",
        ),
        *(sys.executable, "-u", "-m", "mlx_empire.train", "recipe.yaml", "run.steps=5"),
        *("--hosts", f"{here}/macs.txt"),
    ]
    assert mpirun().is_absolute()
    assert Path(sys.executable).is_absolute()


def test_ranks_that_share_a_machine_may_outnumber_its_cores() -> None:
    shared = parse_hostfile("localhost slots=4\n", "here.txt")
    assert "--oversubscribe" in mpirun_line(replace(LAUNCH, cluster=shared), {})
    assert "--oversubscribe" not in mpirun_line(LAUNCH, {})


def test_on_one_machine_no_rank_opens_a_port() -> None:
    """What these words do is seen in tests/security/test_artefacts.py."""
    alone = parse_hostfile("localhost slots=2\n", "here.txt")
    assert "--mca btl self,sm" in " ".join(mpirun_line(replace(LAUNCH, cluster=alone), {}))
    assert "btl" not in mpirun_line(LAUNCH, {})


def test_the_interface_is_for_the_transport() -> None:
    line = mpirun_line(replace(LAUNCH, interface="en0"), {})
    at = line.index("btl_tcp_if_include")
    assert line[at - 1 : at + 2] == ["--mca", "btl_tcp_if_include", "en0"]

    at = line.index("prte_if_include")
    assert line[at - 1 : at + 2] == ["--prtemca", "prte_if_include", "en0"]
    alone = parse_hostfile("localhost slots=2\n", "here.txt")  # mpirun refuses the loopback for its daemons
    assert "prte_if_include" not in mpirun_line(replace(LAUNCH, cluster=alone, interface="lo"), {})


def test_on_macs_the_daemons_stay_in_their_sessions_and_keep_sockets_where_names_are_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = "--leave-session-attached --prtemca prte_tmpdir_base /tmp"
    assert words not in " ".join(mpirun_line(LAUNCH, {}))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert words in " ".join(mpirun_line(LAUNCH, {}))
    alone = parse_hostfile("localhost slots=2\n", "here.txt")
    assert words not in " ".join(mpirun_line(replace(LAUNCH, cluster=alone), {}))


@pytest.mark.parametrize(
    "name",
    [
        "AGX_RELAX_CDM_CTXSTORE_TIMEOUT",
        "MLX_SDPA_VJP_FALLBACK",
        "MLX_ENABLE_TF32",
        "MLX_BFS_MAX_WIDTH",
        "MLX_RESIDENCY_SET_MAX_PCT",
        "MLX_METAL_RESIDENCY_REFRESH_INTERVAL_MS",
        "MLX_METAL_GPU_ARCH",
        "MLX_EMPIRE_DEVICE",
    ],
)
def test_what_changes_how_a_gpu_computes_reaches_every_machine(name: str) -> None:
    kept = clean_environment({name: "1"})
    assert kept[name] == "1"
    line = mpirun_line(LAUNCH, kept)
    assert line[line.index(name) - 1] == "-x"


def test_no_secret_reaches_a_rank() -> None:
    secrets = {"HF_TOKEN": "canary", "AWS_SECRET_ACCESS_KEY": "canary", "MY_PASSWORD": "canary"}
    shell = secrets | {"PATH": "/bin", "PYTHONPATH": "/src", "PRTE_MCA_plm_ssh_agent": "ssh"}
    kept = clean_environment(shell)
    assert "canary" not in kept.values()
    assert {"PATH", "PYTHONPATH", "PRTE_MCA_plm_ssh_agent"} <= kept.keys()
    assert "canary" not in printed(mpirun_line(LAUNCH, kept))


def test_a_variable_can_be_asked_for_by_name() -> None:
    launch = replace(LAUNCH, extra=("MY_SETTING",))
    kept = clean_environment({"MY_SETTING": "value"}, launch.extra)
    line = mpirun_line(launch, kept)
    assert kept["MY_SETTING"] == "value"
    assert line[line.index("MY_SETTING") - 1] == "-x"
    assert "value" not in line
    with pytest.raises(UserError, match="--forward NOT_THERE"):
        clean_environment({}, ("NOT_THERE",))


def test_a_setting_that_wedges_gpus_is_refused() -> None:
    with pytest.raises(UserError, match="MLX_METAL_FAST_SYNCH=1"):
        clean_environment({"MLX_METAL_FAST_SYNCH": "1"})
    assert "MLX_METAL_FAST_SYNCH" not in clean_environment({"MLX_METAL_FAST_SYNCH": "0"})


def test_root_is_allowed_where_we_are_root(monkeypatch: pytest.MonkeyPatch) -> None:
    for uid, allowed in ((0, True), (501, False)):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        assert ("OMPI_ALLOW_RUN_AS_ROOT" in clean_environment({})) is allowed
