# SPDX-License-Identifier: Apache-2.0
"""Microbenchmarks: each op beside its peers and beside the limit of the machine, measured in the same run.

    python -m bench                                   all ops
    python -m bench linear_logprob --peers eager trl  one op, two peers
    python -m bench --json --plot speed.png           also write bench/results/<machine>.json and a picture
    python -m bench.train --model DIR --json          all of `fastpost train`: beside TRL, packing, time to start
    python -m bench.train_step --model DIR            whole steps (SFT, DPO, SimPO) beside TRL's trainers
    python -m bench.low_rank --model DIR --text FILE  singular values of a model's keys before and after RoPE
    python -m bench.drop_in --model DIR               ten lines of plain PyTorch, with and without fastpost

How to read the numbers. Providers run interleaved (A B C, C B A, ...) and medians are quoted. One thread comes first,
then all: on small shared machines two hardware threads may sit on one core, which the probe before and after tells.
Every result is checked against a reference of higher precision first, and where it is wrong no ratio is printed.

An op's benchmark is bench/ops/bench_<op>.py: its workloads, its byte and FLOP formulas, its limit and its peers.
"""
