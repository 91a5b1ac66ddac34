// SPDX-License-Identifier: Apache-2.0
// One line per op. Docstrings live in cpp/ops.h and python/fastpost/ops.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind/tensor_caster.h"
#include "core/build_info.h"
#include "core/parallel.h"
#include "ops.h"

namespace nb = nanobind;

namespace {

int torch_num_threads() {
  static PyObject* get = [] {
    PyObject* torch = PyImport_ImportModule("torch");
    PyObject* f = torch ? PyObject_GetAttrString(torch, "get_num_threads") : nullptr;
    Py_XDECREF(torch);
    PyErr_Clear();
    return f;
  }();
  PyObject* n = get ? PyObject_CallNoArgs(get) : nullptr;
  const int threads = n ? static_cast<int>(PyLong_AsLong(n)) : 1;
  Py_XDECREF(n);
  PyErr_Clear();
  return threads;
}

// Around every op: as many threads as torch would use now, and no GIL while kernels run.
struct OpGuard {
  OpGuard() : threads_set((fastpost::set_num_threads(torch_num_threads()), true)) {}
  bool threads_set;
  nb::gil_scoped_release release;
};

// Binds an op; every argument may be None, which cpp/ops then accepts or refuses by name.
template <class... Args>
void def_op(nb::module_& m, const char* name, void (*f)(Args...)) {
  m.def(name, f, nb::call_guard<OpGuard>(), (static_cast<void>(sizeof(Args)), nb::arg().none())...);
}

void empty_op(fastpost::Tensor, fastpost::Tensor, fastpost::Tensor, fastpost::Tensor, fastpost::Tensor) {}

}  // namespace

NB_MODULE(_core, m) {
  m.def("build_info", &fastpost::build_info);
  def_op(m, "empty_op", &empty_op);  // measures the boundary: python -m bench boundary

  def_op(m, "token_logprob", &fastpost::token_logprob);
  def_op(m, "token_logprob_backward", &fastpost::token_logprob_backward);
  def_op(m, "linear_logprob_check", &fastpost::linear_logprob_check);
  def_op(m, "linear_logprob_tile", &fastpost::linear_logprob_tile);
  def_op(m, "linear_logprob_finish", &fastpost::linear_logprob_finish);
  def_op(m, "linear_logprob_tile_backward", &fastpost::linear_logprob_tile_backward);
  m.def("linear_logprob_forward_columns", &fastpost::linear_logprob_forward_columns);
  def_op(m, "linear_logprob_rows", &fastpost::linear_logprob_rows);
  def_op(m, "linear_logprob_forward", &fastpost::linear_logprob_forward);
  def_op(m, "linear_logprob_exponentials_backward", &fastpost::linear_logprob_exponentials_backward);
  m.def("linear_logprob_fused_preferred", &fastpost::linear_logprob_fused_preferred);
  m.def("linear_logprob_fused_bytes", &fastpost::linear_logprob_fused_bytes);
  m.def("linear_logprob_fused_tiles", &fastpost::linear_logprob_fused_tiles);
  m.def("linear_logprob_fused_kept", &fastpost::linear_logprob_fused_kept);
  def_op(m, "linear_logprob_fused", &fastpost::linear_logprob_fused);
  def_op(m, "linear_logprob_fused_backward", &fastpost::linear_logprob_fused_backward);
  def_op(m, "preference_loss", &fastpost::preference_loss);
  def_op(m, "preference_loss_backward", &fastpost::preference_loss_backward);
  def_op(m, "policy_loss", &fastpost::policy_loss);
  def_op(m, "policy_loss_backward", &fastpost::policy_loss_backward);
  def_op(m, "int4_gemm", &fastpost::int4_gemm);
  def_op(m, "int4_gemm_backward", &fastpost::int4_gemm_backward);
  def_op(m, "int4_gemm_dequantize", &fastpost::int4_gemm_dequantize);
  m.def("int4_gemm_fits", &fastpost::int4_gemm_fits, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg());
  m.def("int4_gemm_bytes", &fastpost::int4_gemm_bytes);
  def_op(m, "moe_route", &fastpost::moe_route);
  def_op(m, "moe_route_backward", &fastpost::moe_route_backward);
  def_op(m, "moe_route_plan", &fastpost::moe_route_plan);
  def_op(m, "moe_dispatch", &fastpost::moe_dispatch);
  def_op(m, "moe_dispatch_backward", &fastpost::moe_dispatch_backward);
  def_op(m, "moe_combine", &fastpost::moe_combine);
  def_op(m, "moe_combine_backward", &fastpost::moe_combine_backward);
  def_op(m, "grouped_gemm", &fastpost::grouped_gemm);
  def_op(m, "grouped_gemm_activation_backward", &fastpost::grouped_gemm_activation_backward);
  def_op(m, "grouped_gemm_weight_gradient", &fastpost::grouped_gemm_weight_gradient);
  def_op(m, "grouped_gemm_activate", &fastpost::grouped_gemm_activate);
  m.def("moe_route_bytes", &fastpost::moe_route_bytes);
  m.def("grouped_gemm_bytes", &fastpost::grouped_gemm_bytes);
  def_op(m, "kv_factorize_gram", &fastpost::kv_factorize_gram);
  def_op(m, "kv_factorize_project", &fastpost::kv_factorize_project);
  m.def("kv_factorize_bytes", &fastpost::kv_factorize_bytes);
  def_op(m, "kv_landmarks", &fastpost::kv_landmarks);
  def_op(m, "kv_select", &fastpost::kv_select);
  m.def("kv_select_bytes", &fastpost::kv_select_bytes);
  def_op(m, "kv_reconstruct", &fastpost::kv_reconstruct);
  m.def("kv_reconstruct_bytes", &fastpost::kv_reconstruct_bytes);
  def_op(m, "paged_attention", &fastpost::paged_attention);
  m.def("paged_attention_bytes", &fastpost::paged_attention_bytes);
}
