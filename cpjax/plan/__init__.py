"""What will context parallelism gain? A cost model of the time to first token. Predicted, never measured. No JAX.

Read in this order:

    facts           the data files: devices, models, published measurements, each with its source; and a user's own
    hardware        a device: peak rates, memory, links
    model           a model's shape: parameters, work a token, numbers a token in the cache
    setting         what runs on what: model, device, cp, tp, partition, exchange, chunks
    work            visible pairs of query and key for each rank and step, as integers
    transfers       bytes between ranks, and what of them nothing hides
    time            seconds of a layer, a chunk, a prompt
    memory          bytes on a card, and the longest prompt that fits
    constants       the two fitted numbers
    published       predictions beside what others measured, row by row
    fit             how the two numbers are found from two named rows
    gain            several cp side by side, and from which length cp pays
    deployment      what a MindIE config says of all that
    measured        a user's own efficiencies, links and times
    report, draw    tables, JSON, a picture

The model in one line, for each layer and rank:

    time = max(FLOPs / (peak · efficiency), bytes / memory rate) + exposed transfers

docs/plan.md has every formula, every assumption, and every error.
"""
