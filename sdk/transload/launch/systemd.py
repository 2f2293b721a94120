"""systemd: systemd/NODE/transload-ENGINE.service keeps one process of shell/NODE.sh running."""

from __future__ import annotations

from transload.launch.command import EngineCommand
from transload.launch.container import STOP_SECONDS, start_seconds
from transload.launch.setting import Setting
from transload.launch.topology import Instance
from transload.launch.words import commented, engine_words, header

FORMAT = "systemd"


def files(setting: Setting) -> dict[str, str]:
    """A unit for every process; the shell scripts that they start must be rendered too."""
    return {
        f"systemd/{command.node}/transload-{unit(command)}.service": _unit(setting, instance, command)
        for instance, _, command in setting.rows()
    }


def unit(command: EngineCommand) -> str:
    """A process's name in units: engine-0, engine-0-worker."""
    return f"engine-{command.instance}" + ("" if command.role == "head" else "-worker")


def _unit(setting: Setting, instance: Instance, command: EngineCommand) -> str:
    home, alone = setting.site.directory, len(setting.on(command.node)) == 1
    script = f"{home}/shell/{command.node}.sh" + ("" if alone else f" {command.name}")
    about = [
        *header(setting.plan, f"Keeps {command.name} running on node {command.node}."),
        f"The rendered folder lies in {home} on the node; install with: systemctl link {home}/"
        f"systemd/{command.node}/transload-{unit(command)}.service",
    ]
    lines = [
        "[Unit]",
        f"Description={_percent(engine_words(instance))}",
        "Wants=network-online.target",
        "After=network-online.target",
        "# Five failed starts within an hour are given up; systemctl reset-failed begins anew.",
        "StartLimitIntervalSec=3600",
        "StartLimitBurst=5",
        "",
        "[Service]",
        "Type=exec",
        "# Root unless a drop-in sets User=, which needs the devices' group (HwHiAiUser on Ascend) and the checkpoint.",
        "# VLLM=/path/to/vllm, PATH, HOST_IP, VLLM_API_KEY and whatever else this host needs.",
        "EnvironmentFile=-/etc/default/transload",
        f"ExecStart={script}",
        *_wait(instance, command),
        "Restart=on-failure",
        "RestartSec=15",
        "KillMode=mixed",
        f"TimeoutStopSec={STOP_SECONDS}",
        "LimitMEMLOCK=infinity",
        "LimitNOFILE=1048576",
        "OOMScoreAdjust=-500",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return commented(about) + "\n" + "\n".join(lines) + "\n"


def _wait(instance: Instance, command: EngineCommand) -> list[str]:
    """A head counts as started when it is healthy."""
    if command.role == "worker":
        return []
    url = f"http://127.0.0.1:{command.port}{command.health_path}"
    return [
        "# Started means healthy: `systemctl start` returns when the engine answers.",
        f"ExecStartPost=/bin/sh -c 'until curl -fsS -m 5 -o /dev/null {url}; do sleep 5; done'",
        f"TimeoutStartSec={start_seconds(instance)}",
    ]


def _percent(text: str) -> str:
    return text.replace("%", "%%").replace("\\", "\\\\")
