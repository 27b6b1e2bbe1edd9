"""`loractl doctor` asks the machine and says what it found."""

import json

from click.testing import CliRunner

from loractl.cli.doctor_command import doctor


def test_doctor_reports_versions_device_and_services() -> None:
    result = CliRunner().invoke(doctor, ["--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["libraries"]["torch"]
    assert facts["device"]["kind"] in {"cpu", "cuda"}
    assert facts["memory"]["total_bytes"] > 0


def test_doctor_says_a_service_is_unreachable_when_nothing_listens() -> None:
    result = CliRunner().invoke(
        doctor, env={"LORACTL_HUB": "http://127.0.0.1:9", "LORACTL_SERVER": "http://127.0.0.1:9"}
    )
    assert result.exit_code == 0
    assert "no answer at http://127.0.0.1:9" in result.stdout
