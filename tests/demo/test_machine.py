from __future__ import annotations

import datetime
import json

import torch

import dit_opt
from dit_opt.demo.machine import describe_machine, describe_run, list_versions, read_date


def test_a_machine_is_described_in_json():
    machine = describe_machine()
    json.dumps(machine)
    assert machine["threads"] == torch.get_num_threads()
    assert machine["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert machine["cpu"] and machine["cores"] >= 1 and machine["memory_gib"] > 0


def test_versions_name_what_a_figure_depends_on():
    versions = list_versions()
    assert versions["torch"] == torch.__version__
    assert versions["dit_opt"] == dit_opt.__version__


def test_the_date_has_a_time_zone():
    assert datetime.datetime.fromisoformat(read_date()).utcoffset() == datetime.timedelta(0)


def test_a_file_of_results_says_where_and_when():
    assert list(describe_run()) == ["machine", "versions", "date"]
    assert describe_run()["machine"] == describe_machine()
