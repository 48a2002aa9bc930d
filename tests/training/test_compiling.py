import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from sit_composer.config.schema import ConfigError
from sit_composer.training.compiling import compile_blocks, find_backend
from sit_composer.training.model import ComposerSiT
from sit_composer.transport import Transport
from tests.helpers.networks import NEWER, SPEC, batch, small_network


@pytest.mark.parametrize(("precision", "options"), [("fp32", {}), ("bf16", {}), ("fp32", NEWER)])
def test_the_blocks_compile_as_one_graph_and_agree_with_eager_ones(precision, options):
    graphs = 2 if options else 1  # one for each number of tokens
    torch._dynamo.reset()
    counters.clear()
    networks = (small_network(depth=4, **options) for _ in range(2))
    eager, compiled = (ComposerSiT(network, Transport(), SPEC, precision=precision) for network in networks)
    compiled.network.load_state_dict(eager.network.state_dict())
    compile_blocks(compiled.network, "aot_eager")
    for model in (eager, compiled):
        for _ in range(2):
            model(batch()).mean().backward()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        if q.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6 if precision == "fp32" else 1e-3)
    assert torch.equal(compiled.eval()(batch()), eager.eval()(batch()))
    assert counters["stats"]["unique_graphs"] == graphs  # evaluation is eager


def test_a_backend_that_is_missing_or_fails_is_named(monkeypatch, tmp_path):
    assert find_backend("false", "cpu") is None
    assert find_backend("aot_eager", "cpu") == "aot_eager"
    with pytest.raises(ConfigError, match=r"compile: got nvfuser, expected true, false or a backend: .*inductor"):
        find_backend("nvfuser", "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"got true, which needs a compiler, no-such-compiler; .* set CXX"):
        find_backend("true", "cpu")
    with pytest.raises(ConfigError, match="got tvm, which fails here: No module named 'tvm'; use compile=false"):
        find_backend("tvm", "cpu")  # which torch lists whether it is installed or not
    compiler = tmp_path / "compiler"
    failure = "echo 'a.cpp:1: fatal error: Python.h: No such file'; exit 1"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'g++ (GCC) 12.2.0' && exit\n{failure}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    torch._dynamo.reset()  # what another test has compiled would not be compiled again
    broken = torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))})  # read from CXX once, at its import
    with broken, pytest.raises(ConfigError, match=r"fails here: a\.cpp:1: fatal error: Python\.h: No such file; use"):
        find_backend("true", "cpu")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", shutil.which("true"))
    with pytest.raises(ConfigError, match=r"got True, which fails here: .*Not a directory"):
        find_backend("True", "cpu")
    monkeypatch.setenv("CC", shutil.which("true"))
    monkeypatch.setattr("sit_composer.training.compiling.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package triton; run pip install triton"):
        find_backend("inductor", "cuda")
