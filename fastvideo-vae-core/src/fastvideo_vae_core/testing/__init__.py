"""What the families are tested with. Public and versioned, so that families outside this repository can use it too.

`conformance.ConformanceSuite` is the contract as a suite to inherit, `miniature.MiniatureSuite` that of the miniature
that a family ships; `golden` reads reference outputs of the official implementations; `parity` compares two networks
and names the first layer that differs; `toys` are complete miniature families of each kind of media, `plugins` pretends
that families are installed. Import the submodules: each needs pytest, `conformance` hypothesis too.
"""

import pytest

# So that a failed assertion of a suite shows its values, as one in a test file does.
pytest.register_assert_rewrite(f"{__name__}.contract", f"{__name__}.miniature", f"{__name__}.parity")
