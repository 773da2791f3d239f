// The Python module `dflash_kernels._cuda`: build facts, and ops that are registered with torch on request.
#include <Python.h>

#include <exception>
#include <memory>

#include "bindings/cuda/ops.h"

namespace dflash {
namespace {

const BoxedOp* const kOps[] = {&kWriteContextKv};

PyObject* py_build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "cuda", DFLASH_CUDA_VERSION, "architectures", DFLASH_CUDA_ARCHITECTURES,
                       "torch_abi", "2.10");
}

PyObject* py_ops(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const BoxedOp* op : kOps) {
    PyObject* name = list ? PyUnicode_FromString(op->name) : nullptr;
    if (!name || PyList_Append(list, name) < 0) {
      Py_XDECREF(name);
      Py_XDECREF(list);
      return nullptr;
    }
    Py_DECREF(name);
  }
  return list;
}

PyObject* py_register(PyObject*, PyObject* args) {
  using torch::stable::detail::StableLibrary;
  // Registrations last as long as their library object, and these as long as the process.
  static auto* kept = new std::vector<std::unique_ptr<StableLibrary>>();
  const char *ns, *name;
  if (!PyArg_ParseTuple(args, "ss", &ns, &name)) return nullptr;
  for (const BoxedOp* op : kOps) {
    if (std::strcmp(op->name, name) != 0) continue;
    try {
      kept->push_back(std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, ns, "CUDA", __FILE__, __LINE__));
      kept->back()->impl(name, op->function);
    } catch (const std::exception& error) {
      PyErr_Format(PyExc_RuntimeError, "%s::%s was not registered: %s", ns, name, error.what());
      return nullptr;
    }
    Py_RETURN_NONE;
  }
  PyErr_Format(PyExc_ValueError, "there is no CUDA C++ kernel of an op %s", name);
  return nullptr;
}

PyMethodDef kMethods[] = {
    {"build_info", py_build_info, METH_NOARGS, "build_info() -> dict[str, str]"},
    {"ops", py_ops, METH_NOARGS, "ops() -> list[str]: the ops that have a kernel here"},
    {"register", py_register, METH_VARARGS, "register(namespace, op): this kernel answers namespace::op on CUDA"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace dflash

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda() {
  return PyModule_Create(&dflash::kModule);
}
