// Recorded steps for Python: their capture and their replay.
#pragma once

#include <Python.h>

namespace dflash {

PyObject* py_recording(PyObject*, PyObject*);
PyObject* py_record_size(PyObject*, PyObject* recording);
PyObject* py_replay(PyObject*, PyObject* recording);
bool add_capture(PyObject* module);  // the type Capture; false with Python's error set

}  // namespace dflash
