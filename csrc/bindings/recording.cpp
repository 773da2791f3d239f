// Recorded steps for Python: their capture and their replay.
//
// A capture changes two states of its thread: launches are noted, and torch's stack of dispatch modes has one more.
// Both change inside this file's functions, between whose instructions Python raises no KeyboardInterrupt, and what
// `with` has not ended ends when the object goes: an interrupt cannot leave a capture open.
#include "bindings/recording.h"

#include <exception>
#include <memory>
#include <string>

#include "bindings/host.h"
#include "bindings/team.h"
#include "cpu/parallel.h"

namespace dflash {
namespace {

using Shared = std::shared_ptr<Recorder>;
thread_local Shared t_recorder;

constexpr const char* kCapsule = "dflash_kernels.Recorder";

Recorder* unwrap(PyObject* capsule) {
  const auto* held = static_cast<Shared*>(PyCapsule_GetPointer(capsule, kCapsule));
  return held ? held->get() : nullptr;
}

// The thread that gets the first index leads and runs the launches; the others, as many as torch grants, follow.
void replay_in_a_team(const Recorder& recorder) {
  const int threads = num_threads();
  if (threads <= 1 || Team::current()) return recorder.replay();
  Team team(threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    if (begin != 0) return team.follow();
    const Team::Leading leading(team);
    recorder.replay();
  });
}

// ---- torch's stack of modes, through the functions that its Python part uses ----------------------------------------

PyObject* torch_call(const char* function, PyObject* argument) {
  PyObject* name = PyUnicode_FromString("torch._C");
  PyObject* module = name ? PyImport_GetModule(name) : nullptr;
  PyObject* found = module ? PyObject_CallMethod(module, function, argument ? "O" : nullptr, argument) : nullptr;
  Py_XDECREF(name);
  Py_XDECREF(module);
  return found;
}

Py_ssize_t modes() {
  PyObject* found = torch_call("_len_torch_dispatch_stack", nullptr);
  const Py_ssize_t n = found ? PyLong_AsSsize_t(found) : -1;
  Py_XDECREF(found);
  return n;
}

// ---- Capture --------------------------------------------------------------------------------------------------------

struct Capture {
  PyObject_HEAD
  PyObject *graph, *mode;
  Shared* recorder;  // null before and after the block
  Py_ssize_t modes;  // on the stack before it
};

PyObject* capture_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *graph, *mode;
  if (!PyArg_ParseTuple(args, "OO", &graph, &mode)) return nullptr;
  PyObject* made = PyType_GenericAlloc(type, 0);
  if (auto* self = reinterpret_cast<Capture*>(made)) {
    self->graph = Py_NewRef(graph);
    self->mode = Py_NewRef(mode);
  }
  return made;
}

PyObject* capture_enter(PyObject* object, PyObject*) {
  auto* self = reinterpret_cast<Capture*>(object);
  if (t_recorder || self->recorder) {
    PyErr_SetString(PyExc_RuntimeError, "a step is already being recorded on this thread");
    return nullptr;
  }
  if ((self->modes = modes()) < 0) return nullptr;
  PyObject* pushed = torch_call("_push_on_torch_dispatch_stack", self->mode);
  if (!pushed) return nullptr;
  Py_DECREF(pushed);
  self->recorder = new Shared(std::make_shared<Recorder>());
  t_recorder = *self->recorder;
  Py_RETURN_NONE;
}

// Ends the block, if it is open; what it noted.
Shared end(Capture* self) {
  if (!self->recorder) return nullptr;
  const Shared noted = *self->recorder;
  delete self->recorder;
  self->recorder = nullptr;
  if (t_recorder != noted) return noted;  // another thread ends it, whose modes are others
  t_recorder.reset();
  while (modes() > self->modes) {  // an interrupted block may have left others above ours
    PyObject* popped = torch_call("_pop_torch_dispatch_stack", Py_None);
    if (!popped) break;
    Py_DECREF(popped);
  }
  return noted;
}

PyObject* capture_exit(PyObject* object, PyObject* args) {
  auto* self = reinterpret_cast<Capture*>(object);
  PyObject *type, *value, *traceback;
  if (!PyArg_ParseTuple(args, "OOO", &type, &value, &traceback)) return nullptr;
  Shared noted = end(self);
  if (PyErr_Occurred()) return nullptr;
  if (type != Py_None || !noted) Py_RETURN_NONE;
  PyObject* capsule = PyCapsule_New(new Shared(std::move(noted)), kCapsule, [](PyObject* c) {
    delete static_cast<Shared*>(PyCapsule_GetPointer(c, kCapsule));
  });
  if (!capsule) return nullptr;
  const int failed = PyObject_SetAttrString(self->graph, "_recording", capsule);
  Py_DECREF(capsule);
  if (failed) return nullptr;
  Py_RETURN_NONE;
}

void capture_dealloc(PyObject* object) {
  auto* self = reinterpret_cast<Capture*>(object);
  PyTypeObject* type = Py_TYPE(object);
  PyObject *raised, *value, *traceback;  // an object goes while an exception is on its way
  PyErr_Fetch(&raised, &value, &traceback);
  end(self);
  Py_XDECREF(self->graph);
  Py_XDECREF(self->mode);
  PyErr_Restore(raised, value, traceback);
  auto* release = reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free));
  release(object);
  Py_DECREF(type);
}

PyMethodDef kCaptureMethods[] = {
    {"__enter__", capture_enter, METH_NOARGS, "Begins to note this thread's launches."},
    {"__exit__", capture_exit, METH_VARARGS, "Ends it; graph._recording is what was noted, unless the block raised."},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot kCaptureSlots[] = {
    {Py_tp_doc, const_cast<char*>("Capture(graph, mode): `with` notes a block's launches for graph, under the mode")},
    {Py_tp_new, reinterpret_cast<void*>(capture_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(capture_dealloc)},
    {Py_tp_methods, kCaptureMethods},
    {0, nullptr}};

PyType_Spec kCaptureSpec = {"dflash_kernels._C.Capture", sizeof(Capture), 0, Py_TPFLAGS_DEFAULT, kCaptureSlots};

}  // namespace

Recorder* Recorder::active() { return t_recorder.get(); }

PyObject* py_recording(PyObject*, PyObject*) { return PyBool_FromLong(t_recorder != nullptr); }

PyObject* py_record_size(PyObject*, PyObject* capsule) {
  const Recorder* recorder = unwrap(capsule);
  return recorder ? PyLong_FromSize_t(recorder->size()) : nullptr;
}

PyObject* py_replay(PyObject*, PyObject* capsule) {
  const Recorder* recorder = unwrap(capsule);
  if (!recorder) return nullptr;
  if (t_recorder) {
    PyErr_SetString(PyExc_RuntimeError, "StepGraph: a replay cannot be captured; capture the step itself");
    return nullptr;
  }
  std::string error;
  Py_BEGIN_ALLOW_THREADS
  try {
    replay_in_a_team(*recorder);
  } catch (const std::exception& e) {
    error = e.what();
  }
  Py_END_ALLOW_THREADS
  if (error.empty()) Py_RETURN_NONE;
  PyErr_SetString(PyExc_RuntimeError, error.c_str());
  return nullptr;
}

bool add_capture(PyObject* module) {
  PyObject* type = PyType_FromSpec(&kCaptureSpec);
  if (!type) return false;
  const bool added = PyModule_AddObject(module, "Capture", type) == 0;  // AddObjectRef is newer than the hub's Python
  if (!added) Py_DECREF(type);
  return added;
}

}  // namespace dflash
