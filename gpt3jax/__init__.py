"""GPT-3 training on pods of NVIDIA GPUs: one jitted, sharded JAX program.

Start with `main.py` (the entry), `train.py` (the loop), `step.py` (one update), then
`gradient/` and `model/`. Each folder, a room, is a layer, and imports go only down this list:

    main.py, train.py                      a run: the entry, the loop
    report/ summary/                       commands: how runs went, what one learned
    evaluate/ sample/ convert/ preflight/  commands
    run/                                   what a run does besides its steps
    plan/                                  what a config takes on GPUs that are not there
    checkpoint/                            saving and restoring
    step.py                                one training step
    gradient/                              loss and gradient of a batch
    watch/                                 one clock for each process, and what reads it
    data/                                  the batch, samples, corpora, tokenizers
    model/ optimizer.py                    the network; the update
    record/                                console, metrics.jsonl, TensorBoard, W&B
    page/                                  the look of HTML pages
    sharding/                              the mesh, rules and layouts
    distributed/ hardware/                 processes; GPUs
    config/ errors.py                      the tree of fields; errors that a user can fix

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
