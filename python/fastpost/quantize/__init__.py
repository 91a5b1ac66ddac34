# SPDX-License-Identifier: Apache-2.0
"""Quantisers of weights after training, one method a file, and the run that takes a model through one.

    rtn, nf4, ir_qlora, db_llm          from the weight alone
    gptq, quip, pb_llm, billm           from the weight and the second moments of its inputs (moments.py)
    awq, smoothquant                    move scales between the layers of a block first (fold.py)

Each matrix function takes W [N, K] and gives a Quantized: what W now stands for and what that costs. run.py walks a
model block by block (blocks.py), cli/quantize.py is the command.
"""
