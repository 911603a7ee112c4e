"""What the operator tests share."""

from .cases import (
    STEPS as STEPS,
)
from .cases import (
    Case as Case,
)
from .cases import (
    assert_run_follows_reference as assert_run_follows_reference,
)
from .cases import (
    assert_step_rule as assert_step_rule,
)
from .cases import (
    assert_written as assert_written,
)
from .cases import (
    case as case,
)
from .cases import (
    cases as cases,
)
from .cases import (
    displacement_noise as displacement_noise,
)
from .cases import (
    every_case as every_case,
)
from .cases import (
    labels as labels,
)
from .cases import (
    later_step as later_step,
)
from .cases import (
    named as named,
)
from .cases import (
    new_step as new_step,
)
from .cases import (
    next_step as next_step,
)
from .cases import (
    schemas as schemas,
)
from .inputs import (
    AWKWARD_SHAPES as AWKWARD_SHAPES,
)
from .inputs import (
    CAMPAIGN as CAMPAIGN,
)
from .inputs import (
    FLOATS as FLOATS,
)
from .inputs import (
    FULL as FULL,
)
from .inputs import (
    MUON as MUON,
)
from .inputs import (
    SHAPES as SHAPES,
)
from .inputs import (
    decaying as decaying,
)
from .inputs import (
    fuzzed as fuzzed,
)
from .inputs import (
    gaussian as gaussian,
)
from .inputs import (
    generator as generator,
)
from .inputs import (
    instruction_set as instruction_set,
)
from .inputs import (
    integers as integers,
)
from .inputs import (
    orthogonal as orthogonal,
)
from .inputs import (
    refusal as refusal,
)
from .inputs import (
    semidefinite as semidefinite,
)
from .inputs import (
    semidefinites as semidefinites,
)
from .inputs import (
    state_dtype as state_dtype,
)
from .inputs import (
    with_eigenvalues as with_eigenvalues,
)
from .inputs import (
    with_singular_values as with_singular_values,
)
from .layouts import (
    LAYOUTS as LAYOUTS,
)
from .layouts import (
    Placed as Placed,
)
from .layouts import (
    bits as bits,
)
from .layouts import (
    same_bits as same_bits,
)
from .oracles import (
    exact_eigen as exact_eigen,
)
from .oracles import (
    exact_inverse_root as exact_inverse_root,
)
from .oracles import (
    exact_newton_schulz as exact_newton_schulz,
)
from .oracles import (
    jacobi as jacobi,
)
from .oracles import (
    plain_newton_root as plain_newton_root,
)
from .oracles import (
    plain_newton_schulz as plain_newton_schulz,
)
from .rule import (
    FACTOR as FACTOR,
)
from .rule import (
    LEAST_JITTER as LEAST_JITTER,
)
from .rule import (
    ONE_DRAW as ONE_DRAW,
)
from .rule import (
    allowed_error as allowed_error,
)
from .rule import (
    assert_rule as assert_rule,
)
from .rule import (
    draws as draws,
)
from .rule import (
    error as error,
)
from .rule import (
    errors as errors,
)
from .rule import (
    exact as exact,
)
from .rule import (
    input_noise as input_noise,
)
from .rule import (
    jittered as jittered,
)
from .rule import (
    rms as rms,
)
from .rule import (
    textbook_error as textbook_error,
)
from .rule import (
    unit_roundoff as unit_roundoff,
)
