"""The judge on trial: correct results that it must accept, wrong ones that it must not, and what others say.

    problem      what is asked: query, key, value, scale, who sees whom, into how many chunks the keys are cut
    emulators    correct results, rounded where the profile says, written without looking at the judge's error model
    kinds        data, friendly and hostile; activations: data of a trained model
    foreign      correct results of kernels that are not ours
    cuda/        kernels of a GPU, where there is one: forward, backward, long, and with planted faults
    other_logits problems with softcap, sink, ALiBi slopes, bias
    faults       wrong results, one named function each
    rivals       the acceptance rules of others, on the same results
    localise     how often the diagnosis names the place of a fault
    naming       how often it names the cause: reported_faults and unnamed_faults in settings, by a plain_attention;
                 what is reported is in merge_, row_, mask_, key_ and logit_faults, each made of a fault_case

`python -m cpjax.trial --help` runs them; docs/trial.md has the figures.
"""
