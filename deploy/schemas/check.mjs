// Validate objects of the Prometheus operator and KEDA, given as a JSON array on standard input: values by the packages'
// schemas, and unknown fields by their types. Each fault is a line on standard error; exit code 1 if there is one.
//
// make schemas && node .schemas/check.mjs < objects.json
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import ts from "typescript";
import * as operator from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";

const KINDS = {
  ServiceMonitor: [operator.ServiceMonitor, "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1"],
  PrometheusRule: [operator.PrometheusRule, "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1"],
  ScaledObject: [ScaledObject, "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject"],
};
const objects = JSON.parse(readFileSync(0, "utf8"));
const faults = [];
const lines = [];
objects.forEach((object, at) => {
  const known = KINDS[object.kind];
  if (!known) {
    faults.push(`${object.kind}: no schema here; known are ${Object.keys(KINDS).join(", ")}`);
    return;
  }
  const [Model, place] = known;
  try {
    new Model(object).validate();
  } catch (error) {
    faults.push(`${object.kind} ${object.metadata?.name}: ${error.message}`);
  }
  lines.push(`import { type I${object.kind} as Type${at} } from "${place}";`);
  lines.push(`export const object${at}: Type${at} = ${JSON.stringify(object)};`);
});

const name = join(dirname(fileURLToPath(import.meta.url)), "objects.ts");
const options = { strict: true, noEmit: true, skipLibCheck: true, module: ts.ModuleKind.NodeNext,
  moduleResolution: ts.ModuleResolutionKind.NodeNext, target: ts.ScriptTarget.ES2022, types: [] };
const host = ts.createCompilerHost(options);
const { getSourceFile, fileExists } = host;
host.fileExists = (path) => path === name || fileExists(path);
host.getSourceFile = (path, ...rest) =>
  path === name ? ts.createSourceFile(path, lines.join("\n"), rest[0]) : getSourceFile(path, ...rest);
for (const found of ts.getPreEmitDiagnostics(ts.createProgram([name], options, host))) {
  faults.push(ts.flattenDiagnosticMessageText(found.messageText, " "));
}
if (faults.length) {
  console.error(faults.join("\n"));
  process.exitCode = 1;
}
console.log(`${objects.length} objects checked`);
