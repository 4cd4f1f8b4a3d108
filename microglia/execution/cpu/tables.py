"""What stands where in the tables that a step reads: rows of 64-bit integers, some of them addresses or doubles."""

# How numbers are stored.
F32, BF16, F16, INT8, INT4 = range(5)

# Norms (0 is none) and activations.
RMS, LAYER = 1, 2
SILU, TANH_GELU, GELU, RELU = range(4)

# A projection: the address of the code that multiplies by it; whether it lies in columns, as (inputs, outputs); the
# first address; bytes from one stored row to the next; numbers in a row that count; scales and bias, 0 where there are
# none; below which size an input does not count.
CODE, BY_COLUMNS, BASE, STEP, LENGTH, SCALES, BIAS, THRESHOLD, PROJECTION = range(9)

# What such code is given: the matrix as above; how many vectors, where the first is and how many bytes further the
# next; where their results belong.
(
    JOB_BASE,
    JOB_STEP,
    JOB_LENGTH,
    JOB_SCALES,
    JOB_X,
    JOB_X_STEP,
    JOB_COUNT,
    JOB_OUT,
    JOB_OUT_STEP,
    JOB,
) = range(10)

# A norm: its kind, its weight and bias in float32, its epsilon.
NORM_KIND, NORM_WEIGHT, NORM_BIAS, NORM_EPS, NORM = range(5)

# A rotary embedding: its frequencies in float32, how many, the factor of sine and cosine.
FREQUENCIES, FREQUENCY_COUNT, ROTARY_FACTOR, ROTARY = range(4)

# A layer. HEADS … CHANNELS: the whole numbers of its shape. *_RUNS: the runs that are kept, their number, the units in
# them. UNITS: of every row and query head that is computed: row, head, group, slot of the group in the row's cache, -1
# where the head belongs to another row. FILL: what pruned heads leave behind, (B, hidden), or 0.
(
    HEADS,
    GROUPS,
    SIZE,
    CHANNELS,
    WINDOW,
    SCALING,
    SOFTCAP,
    ROTARY_AT,
    ACTIVATION,
    QUERY,
    KEY,
    VALUE,
    OUTPUT,
    GATE,
    UP,
    DOWN,
    NORM_ATTENTION,
    NORM_QUERY,
    NORM_KEY,
    NORM_ATTENDED,
    NORM_MLP,
    NORM_FED,
    HEAD_RUNS,
    HEAD_RUN_COUNT,
    HEADS_KEPT,
    GROUP_RUNS,
    GROUP_RUN_COUNT,
    GROUPS_KEPT,
    CHANNEL_RUNS,
    CHANNEL_RUN_COUNT,
    CHANNELS_KEPT,
    UNITS,
    UNIT_COUNT,
    FILL,
    KEYS,
    VALUES,
    CACHE_ROW,
    CACHE_SLOT,
    LAYER_FIELDS,
) = range(39)
UNIT = 4

# The model and the request. *_OF: places of the first thread's own buffers, PRIVATE_STEP bytes from those of the next.
# *_PARTS: sums of the first thread, (B, *_WIDTH) float32; others' follow.
(
    LAYERS,
    LAYER_COUNT,
    THREADS,
    BATCH,
    HIDDEN,
    VOCABULARY,
    CACHE_KIND,
    KEY_CODE,
    VALUE_CODE,
    EMBEDDING,
    EMBEDDING_KIND,
    EMBEDDING_FACTOR,
    POSITIONS,
    NORM_LAST,
    HEAD,
    LOGIT_CAP,
    EVERY_HIDDEN,
    EVERY_TOKEN,
    IOTA,
    ROTARIES,
    ROTARY_COUNT,
    ROTARY_WIDTH,
    TOKENS,
    PLACE,
    STARTS,
    LOGITS,
    COUNTER,
    PRIVATE_STEP,
    HIDDEN_OF,
    NORMED_OF,
    SCORES_OF,
    LIST_OF,
    JOB_OF,
    ROTATION_OF,
    ATTENTION_PARTS,
    ATTENTION_WIDTH,
    ATTENDED,
    OUT_PARTS,
    MLP_PARTS,
    MLP_WIDTH,
    FED,
    LONGEST,
    BEST,
    ANSWER,
    ANSWER_LENGTH,
    STOPS,
    STOP_COUNT,
    PAD,
    ENDED,
    ALL_ENDED,
    PLAN_FIELDS,
) = range(51)
