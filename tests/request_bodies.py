"""Bodies of requests to the server: those that it refuses, with what it says, and random ones."""

import json

from hypothesis import strategies as st

from qvpo_rllib.serving.schema import MAX_K, MAX_ROWS

OBS_DIM = 4  # of InvertedPendulum-v5
ZEROS = "[0, 0, 0, 0]"

# (body, a pattern of the refusal)
REFUSED = [
    ("", "JSON"),
    ("{", "JSON"),
    ("\x00\xff", "JSON"),
    ("[" * 100_000, "JSON"),
    ("null", "object"),
    ("[]", "object"),
    ("{}", "observations: Field required"),
    ('{"observations": []}', "at least 1"),
    ('{"observations": [[]]}', r"observations\[0\]"),
    ('{"observations": [[0, 0, 0]]}', "has 3 numbers; InvertedPendulum-v5 needs 4"),
    (f'{{"observations": [{ZEROS}, [0, 0, 0, 0, 0]]}}', r"observations\[1\] has 5"),
    ('{"observations": [[0, 0, 0, NaN]]}', r"observations\[0\]\[3\].*finite"),
    ('{"observations": [[0, 0, 0, -Infinity]]}', "finite"),
    ('{"observations": [[0, 0, 0, 1e999]]}', "finite|valid"),
    ('{"observations": [[0, 0, 0, 1e39]]}', "not finite in float32"),
    ('{"observations": [[0, 0, 0, "0"]]}', "number"),
    ('{"observations": [[0, 0, 0, true]]}', "number"),
    ('{"observations": [[0, 0, 0, null]]}', "number"),
    ('{"observations": "0000"}', "list|array"),
    (f'{{"observations": [{ZEROS}], "K": 4}}', "K: Extra"),
    (f'{{"observations": [{ZEROS}], "k": 0}}', "k: "),
    (f'{{"observations": [{ZEROS}], "k": {MAX_K + 1}}}', "k: "),
    (f'{{"observations": [{ZEROS}], "k": 4.5}}', "k: "),
    (f'{{"observations": [{ZEROS}], "k": true}}', "k: "),
    (f'{{"observations": [{ZEROS}], "seed": -1}}', "seed: "),
    (f'{{"observations": [{ZEROS}], "seed": {2**63}}}', "seed: "),
    (f'{{"observations": [{ZEROS}], "seed": 1e400}}', "seed: "),
    (f'{{"observations": [{", ".join([ZEROS] * (MAX_ROWS + 1))}]}}', "at most 256"),
]  # fmt: skip

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)
NUMBERS = st.floats(width=32) | st.floats() | st.integers()
ALMOST = st.fixed_dictionaries(
    {
        "observations": st.lists(st.lists(NUMBERS, min_size=3, max_size=5), max_size=4)
        | st.lists(st.lists(NUMBERS | SCALARS, min_size=OBS_DIM, max_size=OBS_DIM), max_size=2)
        | JSON
    },
    optional={"k": st.integers(-2, 300) | JSON, "seed": st.integers() | JSON, "more": JSON},
)
BODIES = ALMOST.map(json.dumps) | JSON.map(json.dumps) | st.binary(max_size=60)
