"""The demo's own command line."""

import pytest

from fitune.demo import __main__ as command


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "demo", interrupted)
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path / "demo")])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 130 and capsys.readouterr().err == "stopped\n"
