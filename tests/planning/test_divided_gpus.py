"""GPUs that are divided (MIG): one instance counts, with its share of the cores and what others leave of its memory."""

import pytest
from fake_nvidia_smi import card

from fitune.planning.hardware import this_machine

LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1111)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaa)
  MIG 2g.10gb     Device  1: (UUID: MIG-bbbb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-2222)"""


@pytest.mark.parametrize(
    ("visible", "gib", "share"),
    [(None, 18.6, 3 / 7), ("MIG-bbbb", 9.3, 2 / 7), ("GPU-2222", 40.0, 1.0), ("0", 18.6, 3 / 7), ("1", 40.0, 1.0)],
)
def test_of_instances_of_a_divided_gpu_one_counts(visible, gib, share, nvidia_smi, monkeypatch):
    a100 = {"name": "NVIDIA A100-SXM4-40GB", "memory__total": "40960", "memory__free": "40960", "compute_cap": "8.0"}
    nvidia_smi([card(1, **a100, mig__mode__current="Enabled"), card(2, **a100, mig__mode__current="Disabled")], LISTED)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    [gpu] = this_machine().gpus
    assert round(gpu.total_gib, 1) == gib and gpu.share == pytest.approx(share)
    assert gpu.model.bf16_tflops == pytest.approx(312 * share)


INSTANCE = """\
   <mig_device>
    <index>{}</index>
    <gpu_instance_id>2</gpu_instance_id>
    <device_attributes><shared><multiprocessor_count>42</multiprocessor_count></shared></device_attributes>
    <fb_memory_usage>
     <total>{} MiB</total>
     <reserved>0 MiB</reserved>
     <used>0 MiB</used>
     <free>{}</free>
    </fb_memory_usage>
   </mig_device>
"""
XML = """\
<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
 <gpu id="00000000:07:00.0">
  <mig_mode><current_mig>Enabled</current_mig></mig_mode>
  <mig_devices>
{}  </mig_devices>
  <fb_memory_usage><total>40960 MiB</total><free>N/A</free></fb_memory_usage>
  <uuid>GPU-1111</uuid>
 </gpu>
</nvidia_smi_log>"""


def test_memory_that_others_use_inside_an_instance_is_not_free(nvidia_smi, tmp_path, monkeypatch):
    a100 = {"name": "NVIDIA A100-SXM4-40GB", "memory__total": "40960", "memory__free": "40960", "compute_cap": "8.0"}
    rows = [card(1, **a100, mig__mode__current="Enabled"), card(2, **a100, mig__mode__current="Disabled")]

    def seen(identity: str, xml: str) -> tuple[float, float]:
        nvidia_smi(rows, LISTED, xml=xml)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", identity)
        [gpu] = this_machine().gpus
        return round(gpu.total_gib, 2), round(gpu.free_gib, 2)

    xml = XML.format(INSTANCE.format(0, 19968, "2048 MiB") + INSTANCE.format(1, 9856, "9728 MiB"))
    assert seen("MIG-aaaa", xml) == (19.5, 2.0) and seen("MIG-bbbb", xml) == (9.62, 9.5)
    assert (tmp_path / "asked").read_text().count("-q -x\n") == 2  # once each time
    by_name = (18.63, 18.63)  # of drivers that do not tell
    for without in (XML.format(INSTANCE.format(0, 19968, "[N/A]")), XML.format("None"), "not a valid option", ""):
        assert seen("MIG-aaaa", without) == by_name


def test_a_machine_whose_gpus_are_whole_is_not_asked_for_instances(nvidia_smi, tmp_path):
    nvidia_smi([card(1)])
    assert this_machine().gpus
    assert (tmp_path / "asked").read_text().count("\n") == 1


def test_an_instance_that_is_all_of_its_gpu_is_one_all_the_same(nvidia_smi):
    """CUDA shows a process one instance, however large; an A30 and an RTX PRO are divided into four parts at most."""
    whole = "GPU {0}: {1} (UUID: GPU-{0}{0}{0}{0})\n  MIG {2}     Device  0: (UUID: MIG-{0})"
    a100 = {"name": "NVIDIA A100-SXM4-80GB", "memory__total": "81920", "memory__free": "81920", "compute_cap": "8.0"}
    rows = [card(n, **a100, mig__mode__current="Enabled") for n in (1, 2)]
    nvidia_smi(rows, "\n".join(whole.format(n, a100["name"], "7g.80gb") for n in (1, 2)))
    [gpu] = this_machine().gpus
    assert (gpu.share, gpu.identity, gpu.shown_as) == (1, "MIG-1", "MIG-1")
    a30 = a100 | {"name": "NVIDIA A30", "memory__total": "24576", "memory__free": "24576"}
    nvidia_smi([card(1, **a30, mig__mode__current="Enabled")], whole.format(1, "NVIDIA A30", "2g.12gb"))
    [gpu] = this_machine().gpus
    assert gpu.share == 0.5 and gpu.model.bf16_tflops == 165 / 2
