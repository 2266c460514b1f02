"""What the doctor says of a machine."""

from promptrec import doctor


def test_a_tpu_is_named_where_there_is_one(monkeypatch):
    assert "CPU cores" in doctor.devices() and "TPU" not in doctor.devices()
    monkeypatch.setattr(doctor, "detect", lambda: "kaggle-tpu")
    assert doctor.devices().endswith(", a TPU")
