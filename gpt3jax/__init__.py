"""GPT-3 training on pods of NVIDIA GPUs: one jitted, sharded JAX program.

Read on in `main.py` (the entry), `train.py` (the loop), `step.py` (one update), `model.py`
(the network). `docs/architecture.md` has the map.

Shape suffixes, one legend for the whole project: an array's name ends in its dimensions.

    B batch (sequences)     T query position (time)   S key position
    D d_model               H attention heads         K d_head
    F d_ff                  V vocabulary              L layers
    M microbatches          P pipeline stages         R virtual stages of each
    G groups of P microbatches, M / P                 C shards of the sequence, of R chunks each
    N chunks of the loss    U positions of a chunk    a digit is a literal size

So `q_BTHK` is [batch, time, heads, d_head] and `w_qkv_D3HK` [d_model, 3, heads, d_head]. The suffix
is the logical, global shape, whatever the sharding. Einsum strings use the letters in lower case.
"""
