"""The largest arrays of a compiled program."""

import pytest

from gpt3jax.plan import buffer_assignment


@pytest.mark.parametrize("page", ["", " page 0,"])  # from 0.11 on
def test_largest_arrays_share_no_memory_and_name_their_source(page):
    assignment = f"""BufferAssignment:
allocation 7: size 900,{page} preallocated-temp:
 value: <1 big @0> (size=400,offset=0): f32[100]{{0}}
 value: <2 same.place @0> (size=300,offset=100): f32[75]{{0}}
 value: <3 pair{{1}} @0> (size=200,offset=400): bf16[100]{{0}}

Total bytes used: 900
"""
    text = """HloModule m

FileNames
1 "/here/gpt3jax/.venv/lib/site-packages/jax/x.py"
2 "/here/gpt3jax/model.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=2 function_name_id=1 line=12 end_line=12 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

ENTRY %main (p: f32[4]) -> f32[4] {
  %big = f32[100]{0} add(%p, %p), metadata={op_name="jit(f)/add" stack_frame_id=2}
  %same.place = f32[75]{0} add(%p, %p)
  %pair = (f32[4]{0}, bf16[100]{0}) fusion(%p), calls=%c
}
"""
    largest = buffer_assignment.largest(assignment, text)
    assert [(b.n_bytes, b.shape, b.operation, b.source) for b in largest] == [
        (400, "f32[100]", "jit(f)/add", "gpt3jax/model.py:12"),
        (200, "bf16[100]", "fusion", ""),
    ]
