"""What the compiled part does beside a torch that was built for CUDA, with a card or without.

`make cuda-torch` builds for that torch and runs this; it needs nothing but the package.
"""

from __future__ import annotations

import spectral_kernels as sk
import torch
from spectral_kernels import _cuda, _dispatch, _extension, info


def main() -> None:
    assert torch.version.cuda is not None, f"torch {torch.__version__} was built without CUDA"
    assert _extension.MODULE is not None, _extension.REASON
    assert _cuda.not_built() is None, _cuda.not_built()
    x = torch.randn(8, 16)
    product = sk.gram(x)
    assert sk.call_counts(reset=True) == {"gram/cpu": 1}
    facts = info.collect()
    for backend in ("cuda", "triton"):
        reason = _dispatch.unavailable(backend)
        assert facts["backends"][backend] == (reason or "available")
        if reason is None:
            found = sk.gram(x.cuda(), backend=backend).cpu()
            assert torch.allclose(found, product, rtol=1e-5, atol=1e-5)
            continue
        try:
            sk.gram(x, backend=backend)
        except RuntimeError as error:
            assert f"{backend}: {reason}" in str(error), error
        else:
            raise AssertionError(f"{backend} ran, though {reason}")
    print(info.text({name: facts[name] for name in ("versions", "backends", "gpu")}))
    print("beside torch", torch.__version__, "all is well")


if __name__ == "__main__":
    main()
